"""Numbers and marker strings that LLaVA's files, checkpoints and callers agree on.

The values are part of the file formats (`-200` stands for a picture in token ids, `-100` for a
target without a loss), so they never change; other projects import them from this path.
"""

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

# Seconds between two signs of life in serving, and where the servers write their logs.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."
