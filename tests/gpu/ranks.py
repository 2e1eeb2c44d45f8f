"""Several ranks through the trainer's own entry point: ZeRO on data of which half is text.

The row of `scripts/gpu_check.sh` that starts processes of its own. On the CPU the ranks talk
through gloo: `python tests/gpu/rows.py zero2 --device cpu`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from train_fixtures import write_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def zero(device: torch.device, stage: int) -> dict[str, Any]:
    """Two ranks under ZeRO through the trainer's own entry point, on data of which half is text, so
    that a rank without a picture meets one with; losses equal those of one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder)
        half_text(folder / "data")
        # Both go on from the same weights: ZeRO-3 draws random ones in another order.
        losses_of(train_command(folder, "base", device), folder / "base", 1)
        one = losses_of(train_command(folder, "one", device), folder / "one", 1)
        two = losses_of(train_command(folder, "two", device, stage), folder / "two", 2)
    assert len(one) == len(two) == STEPS, f"{len(one)} and {len(two)} steps, not {STEPS}"
    difference = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    assert difference < 1e-2, f"losses {two}, of one process {one}"
    return {"losses": two, "largest difference": difference}


def half_text(data: Path) -> None:
    """`half.json`: as many samples with a picture as without, in turn."""
    mixed = json.loads((data / "mixed.json").read_text())
    text = [each for each in mixed if "image" not in each]
    seen = [each for each in mixed if isinstance(each.get("image"), str)]
    pairs = zip((seen * STEPS)[:STEPS], (text * STEPS)[:STEPS], strict=True)
    samples = [{**each, "id": str(i)} for i, each in enumerate(e for pair in pairs for e in pair)]
    (data / "half.json").write_text(json.dumps(samples))


def train_command(
    folder: Path, name: str, device: torch.device, stage: int | None = None
) -> list[str]:
    """Flags of `llava.train.train`: two samples a step, on one process or two ranks. "base" starts
    from random weights and takes one step, the others from what it wrote."""
    start = {"init_from_config": folder / "config", "vision_tower": folder / "tower"}
    flags: dict[str, Any] = {
        **(start if name == "base" else {"model_name_or_path": folder / "base"}),
        "data_path": folder / "data" / "half.json",
        "image_folder": folder / "data" / "images",
        "output_dir": folder / name,
        "version": "mistral_instruct",
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "layer_list": "[1,2]",
        "image_token_ratio_list": "[0.5,0.25]",
        "per_device_train_batch_size": 2 if stage is None else 1,
        "loss_mean": "tokens",
        "max_steps": 1 if name == "base" else STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "model_max_length": 64,
    }
    if stage is not None:
        flags["deepspeed"] = ROOT / "scripts" / f"zero{stage}.json"
    if device.type == "cpu":
        flags["use_cpu"] = True
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def losses_of(flags: list[str], output: Path, processes: int) -> list[float]:
    """Train with the command line and read the loss of each step."""
    words = [sys.executable, "-m", "llava.train.train", *flags]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        words[1:3] = [*launcher, str(processes), "-m", "llava.train.train"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    problems = [
        line for line in done.stderr.splitlines() if line.startswith(("error", "ValueError"))
    ]
    said = problems or done.stderr.strip().splitlines() or [""]
    assert done.returncode == 0, f"{processes} processes: {said[-1]}"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
