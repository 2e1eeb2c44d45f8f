"""One rank: runs the training commands of a JSON list one behind the other in this process.

Started by torch.distributed.run; ``worker.py COMMANDS.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.train.train import main

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        main(command)
