"""What stops a run and what it leaves behind: a loss that is not finite, a signal, a disk that is
full, flags and files that do not fit; and what watches it without touching it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from llava.model.builder import load_pretrained_model
from llava.train import rehearsal
from llava.train import train as entry
from llava.train.safety import EXIT_NOT_FINITE, EXIT_PREEMPTED

sys.path.insert(0, str(Path(__file__).parent))
from test_train import command, losses, pictures  # noqa: E402
from train_fixtures import COLOURS, WORDS, write_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WHITE = WORDS.index("white")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    write_all(folder)
    return folder


def start(files: Path, out: Path, **flags: Any) -> list[str]:
    """A run with pictures from random weights."""
    return command(
        **{
            "init_from_config": files / "config",
            "output_dir": out,
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 6,
            **pictures(files),
            **flags,
        }
    )


# --------------------------------------------------------------------------------------------- NaN
class NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def white_is_nan(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.masked_fill((args[0] == WHITE)[..., None], float("nan"))


def from_the_fourth_call(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    module.calls = getattr(module, "calls", 0) + 1
    return output / 0 if module.calls > 3 else output


FAULTS = {
    # where, fault, what is not finite, step, first bad tensor, does it name samples
    "sample": ("model.embed_tokens", white_is_nan, "loss", 1, "output of model.embed_tokens", True),
    "layer": (
        "model.layers.2.mlp.act_fn", from_the_fourth_call, "loss", 4,
        "output of model.layers.2.mlp.act_fn", False,
    ),
    "gradient": (
        "model.layers.1.mlp", lambda module, args, output: NanBackward.apply(output), "gradient", 1,
        "gradient of model.layers.1.mlp.down_proj.weight", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_nan_guard_names_the_first_bad_tensor_and_the_samples(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    where, hook, what, step, first, per_sample = FAULTS[fault]
    load = entry.load_model

    def faulty(*args: Any) -> Any:
        model = load(*args)
        model.get_submodule(where).register_forward_hook(hook)
        return model

    monkeypatch.setattr(entry, "load_model", faulty)
    with pytest.raises(SystemExit) as stop:
        entry.main(start(files, tmp_path, gradient_accumulation_steps=1 + (fault == "sample")))
    assert stop.value.code == EXIT_NOT_FINITE
    report = json.loads((tmp_path / "nan_report.json").read_text())
    (found,) = report["ranks"]
    assert (report["step"], report["not_finite"]) == (step, what)
    assert found["first_bad"]["tensor"] == first
    assert found["first_bad"]["nan"] + found["first_bad"]["inf"] > 0
    alone = found["samples_alone"]
    if per_sample:  # all eight are in the step; those with the word are named, and only those
        names = [f"(id {i})" for i in range(8) if i % 4 == COLOURS.index("white")]
        assert all(any(name in line for line in alone) for name in names)
        assert len(alone) == len(names) + 1  # and sample 2, whose second picture is white
    assert report["checkpoints"] == (["checkpoint-2"] if step == 4 else [])
    assert not (tmp_path / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------- signals
def test_a_signal_saves_stops_and_resumes_as_if_nothing_had_happened(
    files: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to the data worker itself, which is alive: it still has batches to hand over. Then
    SIGTERM to the whole process group, as Slurm sends it; twice."""
    flags = start(
        files, tmp_path / "run", max_steps=8, save_strategy="no", dataloader_num_workers=1,
        per_device_train_batch_size=1,
    )  # fmt: skip
    entry.main([*flags, "--output_dir", str(tmp_path / "whole")])
    script = tmp_path / "slow.py"  # a step takes long enough to be hit
    script.write_text(
        "import sys, time\n"
        "from llava.train.llava_trainer import LLaVATrainer\n"
        "from llava.train.train import main\n"
        "step = LLaVATrainer.training_step\n"
        "def slow(self, *args):\n"
        "    print('step', self.state.global_step, flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return step(self, *args)\n"
        "LLaVATrainer.training_step = slow\n"
        "main(sys.argv[1:])\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(script), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step 3"):
            break
    (worker,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGUSR1)
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    _, messages = run.communicate(timeout=120)
    assert run.returncode == EXIT_PREEMPTED, messages
    assert "SIGTERM: saving after step 4" in messages
    assert "Traceback" not in messages
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert saved.name == "checkpoint-4"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    entry.main(flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_a_signal_at_the_last_step_changes_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = entry.LLaVATrainer.training_step

    def signalled(self: Any, *args: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *args)

    monkeypatch.setattr(entry.LLaVATrainer, "training_step", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    entry.main(start(files, tmp_path, max_steps=2, save_strategy="no"))
    assert (tmp_path / "train_summary.json").is_file()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGUSR1) == before


# --------------------------------------------------------------------------------------- rehearsal
def contradict(model: Any) -> None:
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.9


def share_storage(model: Any) -> None:
    one, other = (layer.mlp.up_proj for layer in model.model.layers[:2])
    other.weight = torch.nn.Parameter(one.weight.data)


def unsayable(model: Any) -> None:
    model.config.mm_extra = {"tokens": torch.zeros(2)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [(contradict, "temperature"), (share_storage, "share"), (unsayable, "JSON serializable")],
)
def test_what_could_not_be_saved_at_the_end_is_refused_at_the_start(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: Any,
    message: str,
) -> None:  # fmt: skip
    """Without the rehearsal the same run trains and fails when it saves."""
    load = entry.load_model

    def faulty(*args: Any) -> Any:
        model = load(*args)
        fault(model)
        return model

    monkeypatch.setattr(entry, "load_model", faulty)
    stepped: list[int] = []
    step = entry.LLaVATrainer.training_step
    monkeypatch.setattr(
        entry.LLaVATrainer, "training_step", lambda *args: stepped.append(1) or step(*args)
    )
    with pytest.raises(SystemExit) as stop:
        entry.main(start(files, tmp_path / "out"))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not stepped
    assert not any((tmp_path / "out").iterdir())
    with pytest.raises(BaseException) as end:  # noqa: PT011 - one line, or a library's traceback
        entry.main(start(files, tmp_path / "out", save_rehearsal=False, max_steps=1))
    assert message in str(end.value) + capsys.readouterr().err
    assert stepped


@pytest.mark.parametrize(
    ("optim", "projector_only"), [("adamw_torch", False), ("sgd", False), ("adamw_torch", True)]
)
def test_the_space_that_is_asked_for_is_the_space_that_is_used(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, optim: str,
    projector_only: bool,
) -> None:  # fmt: skip
    config = json.loads((files / "config" / "config.json").read_text())
    shutil.copytree(files / "config", tmp_path / "config")
    config |= {"hidden_size": 256, "intermediate_size": 512}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    asked: list[rehearsal.Sizes] = []
    sizes = rehearsal.sizes
    monkeypatch.setattr(rehearsal, "sizes", lambda t: asked.append(sizes(t)) or asked[-1])
    flags = start(
        files, tmp_path / "out", init_from_config=tmp_path / "config", max_steps=2, optim=optim,
        tune_mm_mlp_adapter=projector_only,
    )  # fmt: skip
    entry.main(flags)
    folder = tmp_path / "out" / "checkpoint-2"
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    small = 60_000  # tokenizer, states, settings
    assert asked[0].checkpoint == pytest.approx(sum(written.values()), rel=0.01, abs=small)
    assert asked[0].largest == pytest.approx(max(written.values()), rel=0.01, abs=small)
    weights = "mm_projector.bin" if projector_only else "model.safetensors"
    assert asked[0].model == pytest.approx(written[weights], rel=0.01, abs=small)
    assert asked[0].checkpoint > (3 * small if projector_only else 100 * small)

    needed = asked[0].checkpoint + asked[0].model
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(SystemExit) as stop:
        entry.main([*flags, "--output_dir", str(tmp_path / "second")])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"needs {needed / 1e9:.{2 if needed >= 10**7 else 5}f} GB and" in line
    assert "1 checkpoint(s) of" in line


def test_the_fullest_moment_of_a_run() -> None:
    size = rehearsal.Sizes(model=10, checkpoint=30, largest=20)
    need = rehearsal.needed_bytes
    assert need(size, planned=0, existing=0, limit=None) == 10
    assert need(size, planned=3, existing=0, limit=None) == 3 * 30 + 10
    assert need(size, planned=3, existing=0, limit=1) == 2 * 30
    assert need(size, planned=1, existing=0, limit=1) == 30 + 10
    assert need(size, planned=9, existing=2, limit=2) == 30
    assert need(size, planned=2, existing=1, limit=None) == 2 * 30 + 10


def test_a_folder_that_cannot_be_written_ends_the_run_before_the_first_step(
    files: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        entry.main(start(files, tmp_path / "file" / "out"))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "file is no folder" in last


# ------------------------------------------------------------------------------------------- probe
@pytest.mark.parametrize("packed", [False, True])
def test_the_probe_answers_with_the_plan_and_disturbs_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Bit for bit the same weights and losses; the answers are those of the saved checkpoint."""
    flags: dict[str, Any] = {
        "layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]", "packed": packed,
        "max_steps": 40, "save_strategy": "no", "learning_rate": 2e-2,
        "gradient_checkpointing": True,
    }  # fmt: skip
    entry.main(start(files, tmp_path / "without", **flags))
    entry.main(start(files, tmp_path / "with", probe_samples=4, probe_steps=20, **flags))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("with", "without"))
    assert one == other
    history = json.loads((tmp_path / "with" / "trainer_state.json").read_text())["log_history"]
    probes = [entry for entry in history if "probe_exact" in entry]
    assert [entry["step"] for entry in probes] == [20, 40]
    rows = [row.strip("| ").split(" | ") for row in probes[-1]["probe_answers"].splitlines()[2:]]
    assert [name.split("sample ")[1].split(" ")[0] for name, _, _ in rows] == ["0", "2", "4", "6"]
    assert [reference for _, _, reference in rows] == ["red", "green white", "red", "green"]
    exact = sum(answer == reference for _, answer, reference in rows)
    assert probes[-1]["probe_exact"] == exact / 4

    tokenizer, model, _, _ = load_pretrained_model(
        str(tmp_path / "with"), None, "llava", device="cpu", dtype=torch.float32
    )
    for _, answer, reference in rows[:1] + rows[2:3]:  # text alone: a prompt written here by hand
        ids = tokenizer("[INST] what is this one [/INST]", return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=len(reference.split()) + 9)
        assert tokenizer.decode(new[0], skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize(
    ("settings", "others", "loadable"),
    [
        ({"stage": 3}, {}, False),
        ({"stage": 3}, {"projector_only": True}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, {}, True),
        ({"stage": 3, "gather_16bit_weights_on_model_save": True}, {}, True),
        ({"stage": 2}, {}, True),
    ],
)
def test_zero3_has_to_put_the_weights_together(
    settings: dict[str, Any], others: dict[str, Any], loadable: bool
) -> None:
    found = HfDeepSpeedConfig({"zero_optimization": settings})
    args = SimpleNamespace(hf_deepspeed_config=found)
    trainer = SimpleNamespace(**{"args": args, "projector_only": False, "adapters": None, **others})
    with contextlib.nullcontext() if loadable else pytest.raises(ValueError, match="model.safeten"):
        rehearsal.check_gathering(trainer)


# --------------------------------------------------------------------------------------- full disk
def child(run: Callable[[], None], log: Path) -> int:
    """Exit code of `run` in a forked process, whose output goes to `log`."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            run()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("breaks", ["model.safetensors", "optimizer.pt", "the model at the end"])
def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on(
    files: Path, tmp_path: Path, breaks: str
) -> None:
    """The system refuses to let a file grow any further, behind the first checkpoint."""
    flags = start(files, tmp_path / "run", max_steps=4, save_total_limit=1)
    entry.main([*flags, "--output_dir", str(tmp_path / "whole")])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole/checkpoint-4").iterdir()}
    assert sizes["optimizer.pt"] > sizes["model.safetensors"] + 2000
    room = sizes["model.safetensors"] + (1000 if breaks == "optimizer.pt" else -1000)
    full_at = 4 if breaks == "the model at the end" else 2

    def run() -> None:
        save = entry.LLaVATrainer._save_checkpoint

        def fill_up(self: Any, *args: Any) -> None:
            save(self, *args)
            if self.state.global_step == full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        entry.LLaVATrainer._save_checkpoint = fill_up
        entry.main(flags)

    assert child(run, tmp_path / "log") == 2
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last.startswith("error: the ")
    assert "could not be written" in last
    assert f"checkpoints as they were: checkpoint-{full_at}" in last
    left = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert left == [f"checkpoint-{full_at}"]
    assert not list((tmp_path / "run").glob("*.safetensors"))
    entry.main(flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert ends[0] == ends[1]


# --------------------------------------------------------------------------------------- bad input
@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    entry.main(start(files, files / "trained", max_steps=2))
    return files / "trained" / "checkpoint-2"


def shaped(files: Path, folder: Path, **settings: Any) -> Path:
    """The base's config with other settings."""
    shutil.copytree(files / "config", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_speed": 1}, "unknown flag(s): --learning_speed"),
        ({"layer_list": "[40]", "image_token_ratio_list": "[0.5]"}, "layer 40 does not fit"),
        ({"data_path": "{tmp}/text"}, "record 0 is not JSON"),
        ({"image_folder": "{tmp}/nowhere"}, "image folder not found"),
        ({"init_from_config": {"model_type": "gpt2"}}, "has model_type 'gpt2'; accepted: llama"),
        ({"init_from_config": {"text_config": {}}}, "model_type 'llama' is nested"),
        ({"resume_from_checkpoint": "{tmp}/nowhere"}, "nowhere"),
        ({"init_from_config": {"hidden_size": 32}}, "hidden_size is 16 there and 32 here"),
        ({"init_from_config": {"num_hidden_layers": 5}}, "num_hidden_layers is 4 there and 5 here"),
        ({"tune_mm_mlp_adapter": True}, "tune_mm_mlp_adapter is False there and True here"),
        ({"freeze_backbone": True}, "its run trained other parts of the model"),
        ({"cut": "model.safetensors"}, "cannot be read"),
        ({"cut": "optimizer.pt"}, "cannot be read"),
        ({"remove": "optimizer.pt"}, "has no optimizer.pt"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0"),
        ({"save_steps": 0}, "--save_steps 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "nothing to do"),
        ({"probe_samples": 2}, "--probe_samples 2 needs --probe_steps"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_checkpoints_alone(
    files: Path, trained: Path, tmp_path: Path, capsys: Any, flags: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run / "checkpoint-2")
    flags = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in flags.items()}
    (tmp_path / "text").write_text("[{]")
    if name := flags.pop("cut", None):
        file = run / "checkpoint-2" / name
        file.write_bytes(file.read_bytes()[:3000])
    if name := flags.pop("remove", None):
        (run / "checkpoint-2" / name).unlink()
    if settings := flags.get("init_from_config"):
        flags["init_from_config"] = shaped(files, tmp_path / "config", **settings)
    before = {path.name: path.read_bytes() for path in (run / "checkpoint-2").iterdir()}
    with pytest.raises(SystemExit) as stop:
        entry.main(start(files, run, **flags))
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert before == {path.name: path.read_bytes() for path in (run / "checkpoint-2").iterdir()}
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]


def test_full_determinism_runs_and_repeats_itself(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the flag sets some for CUDA
    flags: dict[str, Any] = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}
    try:
        for name in ("one", "two"):
            entry.main(start(files, tmp_path / name, full_determinism=True, max_steps=2, **flags))
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert ends[0] == ends[1]
