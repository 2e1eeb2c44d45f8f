"""Two gloo ranks give the single process's losses: DDP, ZeRO-2 and ZeRO-3, with and without cuts.

A rank's batch is one sample, so that in most steps one rank has a picture and the other text alone,
or another number of them: a rank that skipped a call would hang the job here. SGD in float32; the
single process accumulates the two batches that the ranks share out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from test_train import command, losses, pictures  # noqa: E402
from train_fixtures import write_all  # noqa: E402

from llava.train.train import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEPS, TIMEOUT = 8, 300
PLANS = {
    "none": {},
    "cuts": {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"},
}
RECIPES = {
    "none": PLANS["none"],
    "cuts": PLANS["cuts"],
    "cuts, packed": {**PLANS["cuts"], "packed": True},
    # A text is looked up in the embeddings at the cut: sharded weights alone can notice.
    "words": {"reduction": "simignore:ratio=0.75,text=question+fastv:k=2,r=0.5"},
}
ENGINES = {"ddp": None, "zero2": "scripts/zero2.json", "zero3": "scripts/zero3.json"}


def need_deepspeed() -> None:
    """Skip by name without DeepSpeed or a compiler for its operators; in CI that is a failure."""
    lacking = []
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        lacking.append("deepspeed")
    lacking += [tool for tool in ("g++", "ninja") if find_tool(tool) is None]
    if lacking:
        text = f"ZeRO is not tested here: no {', '.join(lacking)}"
        if os.environ.get("LLAVA_REQUIRE_DEEPSPEED") == "1":
            pytest.fail(text)
        pytest.skip(text)


def find_tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, base, projector, and the single process's run of each recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    write_all(folder)
    base = {"init_from_config": folder / "config", "data_path": folder / "data" / "text.jsonl"}
    main(command(**base, output_dir=folder / "base", max_steps=20))
    first = {"model_name_or_path": folder / "base", **pictures(folder)}
    main(command(**first, output_dir=folder / "first", max_steps=1))
    weights = load_file(folder / "first" / "model.safetensors")
    projector = {name: value for name, value in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    for name, flags in RECIPES.items():
        out = folder / "single" / name
        main(command(**recipe(folder, flags), output_dir=out, gradient_accumulation_steps=2))
    return folder


def recipe(folder: Path, flags: dict) -> dict:
    return {
        "model_name_or_path": folder / "base",
        "pretrain_mm_mlp_adapter": folder / "mm_projector.bin",
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "optim": "sgd",
        "use_cpu": True,
        **pictures(folder),
        **flags,
    }


def two_ranks(commands: list[list[str]], folder: Path) -> None:
    """Run the commands on two ranks; an assertion with the end of their output if they fail."""
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    # DeepSpeed builds its operators once. In the user's own folder a lock that a killed build has
    # left would hang the job; here nobody else builds.
    build = Path(tempfile.gettempdir()) / f"llava-test-extensions-{torch.__version__}"
    for lock in build.glob("**/lock"):
        lock.unlink()
    environment["TORCH_EXTENSIONS_DIR"] = str(build)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(Path(__file__).with_name("worker.py")), str(file)]
    done = subprocess.run(
        [sys.executable, *launcher, *worker],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_learn_what_one_process_learns(runs, tmp_path, engine):
    if ENGINES[engine]:
        need_deepspeed()
    chosen = {name: RECIPES[name] for name in RECIPES if name != "words" or engine == "zero3"}
    commands = [
        command(**recipe(runs, flags), output_dir=tmp_path / name, deepspeed=ENGINES[engine])
        for name, flags in chosen.items()
    ]
    two_ranks(commands, tmp_path)
    for name in chosen:
        single = runs / "single" / name
        assert losses(tmp_path / name) == pytest.approx(losses(single), abs=1e-5)
        found = load_file(tmp_path / name / "model.safetensors")
        expected = load_file(single / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
