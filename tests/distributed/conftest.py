"""Fixtures of the tests with two ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from train_fixtures import write_all  # noqa: E402
from two_ranks import Ranks, command, pictures  # noqa: E402

from llava.train.train import main  # noqa: E402


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("jobs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a base that was trained on text, and a projector."""
    folder = tmp_path_factory.mktemp("ranks")
    write_all(folder)
    base = {"init_from_config": folder / "config", "data_path": folder / "data" / "text.jsonl"}
    main(command(**base, output_dir=folder / "base", max_steps=20))
    first = {"model_name_or_path": folder / "base", **pictures(folder)}
    main(command(**first, output_dir=folder / "first", max_steps=1))
    weights = load_file(folder / "first" / "model.safetensors")
    projector = {name: value for name, value in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    return folder
