"""Shared by all tests: one seed, one thread, no network."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLAVA_PROGRESS", "0")

import pytest
import torch
from PIL import ImageFile

from llava.utils import set_seed

torch.set_num_threads(1)
# DeepSpeed's operators are built once for all tests of an environment; another's would be built
# over them, since the paths of torch and deepspeed are in them.
PLACE = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
BUILD = Path(tempfile.gettempdir()) / f"llava-test-extensions-{torch.__version__}-{PLACE}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(BUILD))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    set_seed(0)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's evaluator turns it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What all test files have imported is left out of garbage collections from here on: every
    training run in this process makes a full one, of half a second."""
    gc.collect()
    gc.freeze()
