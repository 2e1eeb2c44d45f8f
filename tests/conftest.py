"""Shared by all tests: one seed, one thread, no network, and where recorded data may lie."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLAVA_PROGRESS", "0")

import pytest
import torch

from llava.utils import set_seed

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"

torch.set_num_threads(1)


def reference_root() -> Path | None:
    """The folder of recorded cases beside the checkout, or None where there is none.

    ``LLAVA_REFERENCE=DIR`` names another place. Tests pass without it, on tests/data alone.
    """
    named = os.environ.get("LLAVA_REFERENCE")
    folder = Path(named) if named else ROOT.parent / "shared" / "reference"
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    set_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
