"""A small visual question answering benchmark of real handwritten digits, with the tiny model.

Everything is made from the 1,797 scans that ship inside scikit-learn; nothing is downloaded.
Build the data with `python -m llava.digits.build --out playground/data`; train the tiny
checkpoints with `bash scripts/digits/train.sh`.
"""
