"""Where things lie: the repository, the recorded cases that are part of it, and all of them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"


def reference_root() -> Path | None:
    """The folder of recorded cases beside the checkout, or None where there is none.

    ``LLAVA_REFERENCE=DIR`` names another place. Tests pass without it, on tests/data alone.
    """
    named = os.environ.get("LLAVA_REFERENCE")
    folder = Path(named) if named else ROOT.parent / "shared" / "reference"
    return folder if folder.is_dir() else None
