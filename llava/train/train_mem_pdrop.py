"""LLaVA's old entry point, kept for its scripts: ``python -m llava.train.train`` does the work."""

from llava.train.train import main

if __name__ == "__main__":
    main()
