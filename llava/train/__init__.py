"""Training: arguments, data, sampler and trainer behind ``python -m llava.train.train``."""

from llava.utils import quiet_libraries

quiet_libraries()  # before transformers, peft or DeepSpeed are imported
