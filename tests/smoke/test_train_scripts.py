"""The training scripts: their commands through the real parsers, on any launcher; every one of them
runs real steps. Recipe values are those of LLaVA's, PyramidDrop's, Open-LLaVA-NeXT's and YOPO's
shipped scripts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from llava import cli
from llava.reduction import ReductionPlan
from llava.train import estimate
from llava.train.arguments import parse_args

ROOT = Path(__file__).resolve().parents[2]
PYRAMID = "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]"
YOPO = "yopo:layers=20,heads=0.75,window=5,ffn=2"

# script -> samples a step, most of them a GPU takes, DeepSpeed config, flags by their parsed name
NEXT = {
    "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
    "model_max_length": 4096, "save_steps": 50000,
}  # fmt: skip
STAGE_1 = {"version": "plain", "tune_mm_mlp_adapter": True, "learning_rate": 1e-3}
STAGE_2 = {
    "version": "v1", "tune_mm_mlp_adapter": False, "group_by_modality_length": True,
    "learning_rate": 2e-5,
}  # fmt: skip
ONE_5 = {"mm_patch_merge_type": "flat", "model_max_length": 2048, "unfreeze_mm_vision_tower": False}
RECIPES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "v1_5/pdrop_train/pretrain": (
        256, 32, "zero2", {**ONE_5, **STAGE_1, "image_aspect_ratio": "square", "save_steps": 24000},
    ),
    "v1_5/pdrop_train/finetune": (
        128, 16, "zero3", {**ONE_5, **STAGE_2, "image_aspect_ratio": "pad", "save_steps": 50000},
    ),
    "v1_5/pdrop_train/finetune_lora": (
        128, 16, "zero3",
        {**ONE_5, **STAGE_2, "image_aspect_ratio": "pad", "lora_enable": True, "bits": 16,
         "lora_r": 128, "lora_alpha": 256, "learning_rate": 2e-4, "mm_projector_lr": 2e-5},
    ),
    "v1_5/pdrop_train/finetune_qlora": (
        128, 16, "zero2",
        {**ONE_5, **STAGE_2, "image_aspect_ratio": "pad", "lora_enable": True, "bits": 4,
         "double_quant": True, "quant_type": "nf4", "lora_r": 64, "lora_alpha": 16},
    ),
    "v1_5/finetune_yopo": (
        128, 8, "zero3",
        {**ONE_5, **STAGE_2, "image_aspect_ratio": "pad", "model_max_length": 1560,
         "model_name_or_path": "lmsys/vicuna-13b-v1.5"},
    ),
    "v1_6/pdrop_train/pretrain": (256, 8, "zero2", {**NEXT, **STAGE_1}),
    "v1_6/pdrop_train/finetune": (
        128, 4, "zero2",
        {**NEXT, **STAGE_2, "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 2e-6},
    ),
}  # fmt: skip
LLAVAS_OWN = {
    f"v1_5/{name}": f"v1_5/pdrop_train/{name}" for name in ("pretrain", "finetune", "finetune_lora")
}
COMMON = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "vision_tower": "openai/clip-vit-large-patch14-336",
    "num_train_epochs": 1.0, "weight_decay": 0.0, "gradient_checkpointing": True,
    "save_total_limit": 1, "logging_steps": 1, "dataloader_num_workers": 4, "packed": True,
}  # fmt: skip


def test_no_script_is_left_out() -> None:
    found = {
        str(path.relative_to(ROOT / "scripts").with_suffix(""))
        for pattern in ("v1_*/*train/*.sh", "v1_*/*.sh")
        for path in (ROOT / "scripts").glob(pattern)
    }
    assert found == {*RECIPES, *LLAVAS_OWN}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that gives this machine a number of GPUs, as far as scripts can see."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_NTASKS", "GPUS", "LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PY", sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)

    def with_gpus(count: int) -> None:
        lines = "".join(f"echo 'GPU {i}: stand-in'\n" for i in range(count))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (tmp_path / "nvidia-smi").chmod(0o755)

    with_gpus(0)
    return with_gpus


def start(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", f"scripts/{script}.sh", *words],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def dry_run(script: str, *words: str, **variables: str) -> list[str]:
    """The one command that a script would run."""
    variables = {"HEADS": "heads.npy", **variables}
    if "yopo" in script:
        variables = {"REDUCTION": YOPO, **variables}
    result = start(script, *words, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return shlex.split(line)


def refusal(script: str, **variables: str) -> str:
    result = start(script, **{"DRY_RUN": "1", **variables})
    assert result.returncode == 2, result.stdout
    assert not result.stdout
    return result.stderr


def split(words: list[str]) -> tuple[Any, list[str]]:
    """(the launcher's own parsed flags or None, the training flags) of a command."""
    assert words[0] == sys.executable
    assert words[1] == "-m"
    if words[2] == "deepspeed.launcher.runner":
        runner = pytest.importorskip("deepspeed.launcher.runner")
        args = runner.parse_args(words[3:])
        assert (args.module, args.user_script) == (True, "llava.train.train")
        return args, args.user_args
    if words[2] == "torch.distributed.run":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[3:])
        assert (args.module, args.training_script) == (True, "llava.train.train")
        return args, args.training_script_args
    assert words[2] == "llava.train.train"
    return None, words[3:]


def values(flags: list[str]) -> dict[str, Any]:
    """Every parsed value by its name."""
    model, data, training = parse_args(flags)
    return {**vars(model), **vars(data), **vars(training), "plan": model.plan()}


@pytest.mark.parametrize("script", [*RECIPES, *LLAVAS_OWN])
def test_recipes_are_the_published_ones(script: str, machine) -> None:
    """On one CPU: one process, no DeepSpeed; on eight GPUs: DeepSpeed and the published shares."""
    samples, most, zero, wanted = RECIPES[LLAVAS_OWN.get(script, script)]
    launcher, flags = split(dry_run(script, "--seed", "5"))
    assert launcher is None
    found = values(flags)
    plan = {"v1_5/finetune_yopo": YOPO}.get(script, "none" if script in LLAVAS_OWN else PYRAMID)
    assert found["plan"] == ReductionPlan.parse(plan)
    assert {name: found[name] for name in (*wanted, *COMMON)} == {**COMMON, **wanted}
    assert found["seed"] == 5
    assert found["deepspeed"] is None
    assert found["lr_scheduler_type"].value == "cosine"
    assert found["warmup_steps"] == 0.03

    machine(8)
    launcher, flags = split(dry_run(script))
    assert launcher.num_gpus == 8
    found = values(flags)
    share = (found["per_device_train_batch_size"], found["gradient_accumulation_steps"])
    assert share == (most, samples // (8 * most))
    assert found["deepspeed"] == f"scripts/{zero}.json"


@pytest.mark.parametrize(
    ("stage_1", "stage_2", "variables"),
    [
        ("v1_5/pdrop_train/pretrain", "v1_5/pdrop_train/finetune", {"SIZE": "13b"}),
        ("v1_5/pretrain", "v1_5/finetune", {}),
        ("v1_5/pretrain", "v1_5/finetune_yopo", {"SIZE": "7b"}),
        (
            "v1_6/pdrop_train/pretrain",
            "v1_6/pdrop_train/finetune",
            {"REDUCTION": "fastv:k=2,r=0.5"},
        ),
    ],
)
def test_stage_2_looks_for_the_projector_of_stage_1(
    stage_1: str, stage_2: str, variables: dict[str, str], machine
) -> None:
    first = values(split(dry_run(stage_1, **variables))[1])
    second = values(split(dry_run(stage_2, **variables))[1])
    data = Path("playground/data")  # where llava data prepare-train puts them
    assert Path(first["data_path"]) == data / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    assert Path(first["image_folder"]) == data / "LLaVA-Pretrain" / "images"
    assert Path(second["image_folder"]) == data
    assert Path(second["data_path"]).name in (
        "llava_v1_5_mix665k.json", "open-llava-next_instruct_mix1M.json",
    )  # fmt: skip
    assert second["pretrain_mm_mlp_adapter"] == first["output_dir"] + "/mm_projector.bin"
    assert second["output_dir"] != first["output_dir"]


def test_a_llava_checkpoint_brings_its_own_projector(machine) -> None:
    given = {"MODEL": "liuhaotian/llava-v1.5-7b", "PROJECTOR": "none"}
    found = values(split(dry_run("v1_5/pdrop_train/finetune_lora", **given))[1])
    assert found["pretrain_mm_mlp_adapter"] is None
    assert found["model_name_or_path"] == given["MODEL"]


def test_llama_3_has_its_own_template_and_length(machine) -> None:
    found = values(split(dry_run("v1_6/pdrop_train/finetune", SIZE="8b"))[1])
    assert found["model_name_or_path"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert found["version"] == "llava_llama_3"
    assert (found["model_max_length"], found["save_steps"]) == (6144, 7975)


def test_variables_and_later_flags_win(machine) -> None:
    variables = {
        "MODEL": "mine", "DATA_PATH": "d.json", "IMAGE_FOLDER": "i", "OUTPUT_DIR": "o",
        "PROJECTOR": "p.bin", "VISION_TOWER": "t", "GLOBAL_BATCH": "64", "PACKED": "0",
        "LAYER_LIST": "[4]", "RATIO_LIST": "[0.5]", "SAVE_STEPS": "500", "COMPARE": "50",
    }  # fmt: skip
    found = values(
        split(dry_run("v1_5/pdrop_train/finetune", "--learning_rate", "3", **variables))[1]
    )
    assert [found[name] for name in ("model_name_or_path", "data_path", "image_folder")] == [
        "mine", "d.json", "i",
    ]  # fmt: skip
    assert (found["output_dir"], found["pretrain_mm_mlp_adapter"]) == ("o", "p.bin")
    assert (found["vision_tower"], found["packed"], found["save_steps"]) == ("t", False, 500)
    assert found["compare_steps"] == 50
    assert (found["learning_rate"], found["gradient_accumulation_steps"]) == (3.0, 4)
    assert str(found["plan"]) == "pyramiddrop:layers=[4],ratios=[0.5]"


def test_launchers(machine) -> None:
    script = "v1_5/pdrop_train/finetune"
    machine(8)
    launcher, _ = split(dry_run(script, CUDA_VISIBLE_DEVICES="2,3,6,7", GPUS="2"))
    assert (launcher.include, launcher.num_gpus) == ("localhost:2,3", -1)
    launcher, flags = split(dry_run(script, NNODES="4", HOSTFILE="hosts"))
    assert (launcher.hostfile, launcher.num_nodes, launcher.num_gpus) == ("hosts", 4, 8)
    assert values(flags)["per_device_train_batch_size"] == 4
    launcher, _ = split(dry_run(script, CUDA_VISIBLE_DEVICES="MIG-1f,MIG-2e"))
    assert launcher.nproc_per_node == "2"
    launcher, _ = split(dry_run(script, LAUNCHER="torchrun"))
    assert (launcher.standalone, launcher.nproc_per_node) == (True, "8")
    launcher, flags = split(dry_run(script, DEEPSPEED="none", GPUS="4"))
    assert launcher.nproc_per_node == "4"
    assert values(flags)["deepspeed"] is None
    several = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    launcher, flags = split(dry_run(script, **several))
    assert (launcher.nnodes, launcher.node_rank, launcher.master_addr) == ("2", 1, "first")
    assert values(flags)["deepspeed"] == "scripts/zero3.json"
    machine(0)
    launcher, flags = split(dry_run(script, DEEPSPEED="scripts/zero3_offload.json"))
    assert launcher.nproc_per_node == "1"  # DeepSpeed wants a launcher even for one process
    assert values(flags)["deepspeed"] == "scripts/zero3_offload.json"


def test_an_estimate_starts_no_ranks(machine, tmp_path: Path) -> None:
    """Of a recipe on GPUs that this machine does not have."""
    words = dry_run("v1_5/pdrop_train/finetune", ESTIMATE="1", NNODES="2")
    assert words[1:6] == ["-m", "llava.train.train", "--estimate", "--world_size", "16"]
    own, flags = estimate.own_parser().parse_known_args(words[3:])
    assert own.world_size == 16
    found = values(flags)
    assert found["deepspeed"] == "scripts/zero3.json"
    assert found["per_device_train_batch_size"] == 8


@pytest.mark.parametrize(
    ("gpus", "batch", "expected"),
    [
        (1, "", (16, 8)), (64, "", (2, 1)), (8, "4", (4, 4)),
        (3, "", "126 or 129, or 1 2 of"), (256, "", "=256, or 1 2 4 8 16 32 64 128 of"),
        (8, "5", "1 2 4 8 16"),
    ],
)  # fmt: skip
def test_the_global_batch_stays_what_it_is(gpus: int, batch: str, expected, machine) -> None:
    machine(gpus)
    variables = {"BATCH": batch} if batch else {}
    script = "v1_5/pdrop_train/finetune"
    if isinstance(expected, str):
        assert expected in refusal(script, **variables)
        return
    found = values(split(dry_run(script, **variables))[1])
    share = (found["per_device_train_batch_size"], found["gradient_accumulation_steps"])
    assert share == expected
    assert gpus * share[0] * share[1] == 128


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        ("v1_5/pdrop_train/pretrain", {"SIZE": "70b"}, "SIZE=70b; accepted: 7b 13b"),
        ("v1_5/pdrop_train/pretrain", {"LAUNCHER": "mpirun"}, "deepspeed torchrun srun"),
        ("v1_5/pdrop_train/pretrain", {"LAUNCHER": "srun"}, "outside of an allocation"),
        (
            "v1_5/pdrop_train/pretrain",
            {"LAUNCHER": "srun", "SLURM_NTASKS": "4", "GPUS": "2"},
            "the allocation says",
        ),
        ("v1_5/pdrop_train/pretrain", {"NNODES": "2"}, "NODE_RANK"),
        ("v1_5/pdrop_train/pretrain", {"GLOBAL_BATCH": "many"}, "GLOBAL_BATCH=many"),
        ("v1_5/pdrop_train/pretrain", {"GPUS": "few", "ESTIMATE": "1"}, "GPUS=few"),
        (
            "v1_5/pdrop_train/pretrain",
            {"GPUS": "3", "CUDA_VISIBLE_DEVICES": "0,1"},
            "2 are visible",
        ),
        ("v1_5/finetune_yopo", {}, "HEADS"),
        ("v1_5/pdrop_train/pretrain", {"PACKED": "maybe"}, "PACKED=maybe; accepted: 0 1"),
        (
            "v1_5/pdrop_train/pretrain",
            {"REDUCTION": "none", "LAYER_LIST": "[8]"},
            "give one way of saying the plan",
        ),
        (
            "v1_5/pdrop_train/pretrain",
            {"PY": "/nowhere/python", "DRY_RUN": "0"},
            "no Python at /nowhere/python",
        ),
    ],
)
def test_what_cannot_be_started_is_said(script: str, variables: dict, said: str, machine) -> None:
    assert said in refusal(script, **variables)


@pytest.mark.parametrize(
    "entry", ["train", "train_mem", "train_mem_pdrop", "train_mem_pdrop_next", "llava train"]
)
def test_every_entry_point_is_the_same_program(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As files, as LLaVA's scripts start them, and from the command line of the package."""
    words = ["--model_name_or_path", str(tmp_path / "nowhere"), "--data_path", str(tmp_path / "x"),
             "--output_dir", str(tmp_path / "out"), "--local_rank=0"]  # fmt: skip
    file = str(ROOT / "llava" / "train" / f"{entry}.py")
    monkeypatch.setattr(sys, "argv", [file, *words])

    def start_entry() -> None:
        if entry == "llava train":
            cli.main(["train", *words])
        else:
            runpy.run_path(file, run_name="__main__")

    with pytest.raises(SystemExit) as stop:
        start_entry()
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"error: data file not found: {tmp_path / 'x'}"


def test_missing_deepspeed_is_said(tmp_path: Path, machine) -> None:
    machine(2)
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    result = start("v1_5/pdrop_train/finetune", PY="python")
    assert result.returncode == 2
    assert "deepspeed is not installed" in result.stderr


# -------------------------------------------------------------------------------------- real steps
PREEMPTED = "v1_5/pdrop_train/finetune"  # runs as a job, below


def has_deepspeed() -> bool:
    """Whether DeepSpeed is there, with what it builds its CPU kernels with."""
    found = importlib.util.find_spec("deepspeed") and importlib.util.find_spec("ninja")
    return bool(found and (shutil.which("c++") or shutil.which("g++")))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a smoke run; the first one makes its data."""
    return {"SMOKE": "1", "SMOKE_DIR": str(tmp_path_factory.mktemp("smoke")), "PY": sys.executable,
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in RECIPES if name != PREEMPTED])
def test_a_smoke_run_takes_three_steps(script: str, smoke: dict[str, str]) -> None:
    """One of them through DeepSpeed's launcher, where DeepSpeed can run."""
    variables = {}
    if "qlora" in script:
        pytest.importorskip("bitsandbytes")
    if script == "v1_5/pdrop_train/pretrain" and has_deepspeed():
        # With the environment's own ninja: another one would build DeepSpeed's operators again.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"LAUNCHER": "deepspeed", "DEEPSPEED": "scripts/zero2.json",
                     "MASTER_PORT": str(free_port()), "PATH": path}  # fmt: skip
    result = start(script, **smoke, **variables)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not re.findall(".*(?:is deprecated|gemm_4bit).*", result.stdout + result.stderr)
    out = Path(smoke["SMOKE_DIR"]) / "out" / script
    summary = json.loads((out / "train_summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["plan"]["cuts"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(0 < step["loss"] < 7 and 0 < step["grad_norm"] < 100 for step in steps)
    assert (out / "mm_projector.bin").is_file() == ("pretrain" in script)
    assert (out / "adapter_config.json").is_file() == ("lora" in script)


# ------------------------------------------------------------------------------------------- Slurm
# Every task at once, as Slurm runs them; a signal to the step reaches all of them.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
tasks = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
with open(os.environ["STUB_STEP"], "w") as file:
    file.write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$*" >>"$STUB_LOG"; fi
"""
SQUEUE = """#!/bin/sh
[ -n "$STUB_CANCELLED" ] || echo "$3"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script in an allocation of two tasks, on a CPU."""
    stubs = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    dropped = {"GPUS", "LAUNCHER", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"}
    return {
        **{name: value for name, value in os.environ.items() if name not in dropped},
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_STEP": str(tmp_path / "step"),
        "PY": sys.executable,
        "SLURM_JOB_ID": "41",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": str(free_port()),
    }


def submit(name: str, *words: str, cwd: Path, **variables: str) -> subprocess.Popen:
    """The batch script as Slurm runs it: a copy, from elsewhere."""
    copy = cwd / "slurm_script"
    copy.write_text((ROOT / "scripts" / "slurm" / f"{name}.sbatch").read_text())
    return subprocess.Popen(
        ["bash", str(copy), *words],
        cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_job_splits_its_samples_over_its_tasks(slurm: dict[str, str], tmp_path: Path) -> None:
    variables = {**slurm, "SLURM_NTASKS": "64", "SLURM_GPUS_ON_NODE": "8", "DRY_RUN": "1"}
    for name, samples, zero in (("pretrain", 256, "zero2"), ("finetune", 128, "zero3")):
        job = submit(name, "--seed", "5", cwd=tmp_path, **variables)
        out, error = job.communicate(timeout=60)
        assert job.returncode == 0, error
        words = shlex.split(out)
        assert words[:3] == ["srun", "bash", "scripts/slurm/task.sh"]
        found = values(split(words[3:])[1])
        assert found["per_device_train_batch_size"] * 64 == samples
        assert found["gradient_accumulation_steps"] == 1
        assert (found["seed"], found["save_steps"]) == (5, 500)
        assert found["deepspeed"] == f"scripts/{zero}.json"


@pytest.mark.parametrize(
    ("code", "cancelled", "queued"),
    [(75, "", True), (75, "1", False), (1, "", False), (3, "", False), (0, "", False)],
)
def test_only_a_saved_job_is_queued_again(
    code: int, cancelled: str, queued: bool, slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    job = submit("finetune", cwd=tmp_path, **slurm, STUB_CANCELLED=cancelled)
    job.communicate(timeout=60)
    assert job.returncode == code
    log = tmp_path / "log"
    assert (log.read_text() if log.exists() else "") == ("requeue 41\n" if queued else "")


@pytest.mark.slow
def test_a_preempted_job_goes_on(
    slurm: dict[str, str], smoke: dict[str, str], tmp_path: Path
) -> None:
    """Two ranks; the signal comes at the first step; the job that was queued again ends the run."""
    out = tmp_path / "run"
    variables = {**slurm, **smoke, "OUTPUT_DIR": str(out)}
    words = ("--overwrite_output_dir", "False", "--max_steps", "5")
    job = submit("finetune", *words, cwd=tmp_path, **variables)
    said = []
    for line in job.stderr:
        said.append(line)
        if "step 1/5" in line:
            os.kill(int((tmp_path / "step").read_text()), signal.SIGUSR1)
    assert job.wait(timeout=300) == 75, "".join(said[-30:])
    assert (tmp_path / "log").read_text() == "requeue 41\n"
    (stopped,) = out.glob("checkpoint-*")
    assert int(stopped.name.split("-")[1]) < 5
    assert not (out / "train_summary.json").exists()

    job = submit("finetune", *words, cwd=tmp_path, **variables)
    _, error = job.communicate(timeout=300)
    assert job.returncode == 0, error[-3000:]
    assert json.loads((out / "train_summary.json").read_text())["steps"] == 5
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5]
