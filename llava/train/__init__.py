"""Training: arguments, data, sampler and trainer behind ``python -m llava.train.train``."""
