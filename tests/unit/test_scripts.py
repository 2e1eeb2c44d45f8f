"""Every script parses, every shipped JSON is JSON, every command of a script has a real parser."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.digits import build
from llava.eval import results_report, run
from llava.eval.benchmarks import resolve_names
from llava.reduction import ReductionPlan
from llava.reduction.flags import plan_for_model, plan_from_args

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sbatch"), ROOT / ".ci" / "run"]
)
# Recorded files keep their official names: POPE's .json hold one object a line.
IGNORED = {".git", ".venv", "results", "playground", "node_modules", "data"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _dry_run(script: Path, *words: str, **variables: str) -> list[list[str]]:
    """The commands a script would run, one list of words each."""
    result = subprocess.run(
        ["bash", str(script), *words],
        cwd=ROOT,
        env={**os.environ, "DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if line.strip()]


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_scripts_stop_at_the_first_error(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    if script.name in ("lib.sh", "train_lib.sh", "train_job.sh"):
        assert "set -e" not in text  # sourced: the caller decides
    else:
        assert "set -euo pipefail" in text


def test_every_json_parses() -> None:
    found = [
        path
        for path in ROOT.rglob("*.json")
        if not IGNORED & set(path.relative_to(ROOT).parts) and "checkpoint-" not in str(path)
    ]
    for path in found:
        json.loads(path.read_text(encoding="utf-8"))


def test_no_script_evaluates_text() -> None:
    for script in SCRIPTS:
        assert not re.search(r"^\s*eval\s", script.read_text(encoding="utf-8"), re.M), script


def test_quickstart_command_has_a_real_parser() -> None:
    from llava.quickstart import build_parser

    for variables in ({}, {"FULL": "1"}):
        (words,) = _dry_run(ROOT / "scripts" / "quickstart.sh", "--limit", "36", **variables)
        assert words[1:4] == ["-m", "llava.cli", "quickstart"]
        args = build_parser().parse_args(words[4:])
        assert args.limit == 36
        assert args.full is ("FULL" in variables)


def test_ci_runs_ruff_types_and_tests() -> None:
    commands = [words[2] for words in _dry_run(ROOT / ".ci" / "run")]
    assert commands == ["ruff", "mypy", "pytest"]


def test_test_script_hands_its_arguments_to_pytest() -> None:
    last = _dry_run(ROOT / "scripts" / "test.sh", "tests/unit", "-k", "flops")[-1]
    assert last[2] == "pytest"
    assert last[-3:] == ["tests/unit", "-k", "flops"]


def test_set_up_touches_no_network_when_all_is_there(tmp_path: Path) -> None:
    """A pip that fails is never called: the present environment has everything."""
    log = tmp_path / "log"
    code = f'source scripts/lib.sh; pip_install() {{ echo called >>"{log}"; }}; setup_env ""'
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=ROOT,
        env={**os.environ, "NO_VENV": "1", "PYTHON": os.sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "nothing to install" in result.stderr
    assert not log.exists()


def test_missing_packages_are_noticed() -> None:
    code = 'source scripts/lib.sh; PY="$PYTHON"; has_packages nosuchextra'
    result = subprocess.run(
        ["bash", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHON": os.sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0


def test_constraints_lie_inside_the_ranges() -> None:
    """The tested versions are ones that pyproject.toml admits."""
    packaging = pytest.importorskip("packaging.requirements")
    try:
        import tomllib
    except ImportError:
        tomllib = pytest.importorskip("pip._vendor.tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [packaging.Requirement(line) for line in project["dependencies"]]
    for lines in project["optional-dependencies"].values():
        wanted += [packaging.Requirement(line) for line in lines]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pinned[name.lower()] = version
    checked = [need for need in wanted if need.name.lower() in pinned]
    assert {"torch", "transformers"} <= {need.name for need in checked}
    for need in checked:
        assert need.specifier.contains(pinned[need.name.lower()]), need
    for need in wanted:
        if need.name == "torch":
            assert all(need.specifier.contains(v) for v in ("2.11.0", "2.12.0", "2.13.0"))
        if need.name == "transformers":
            assert all(need.specifier.contains(v) for v in ("5.17.0", "5.23.0"))


def test_flash_attn_is_in_no_extra_that_something_needs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "flash-attn" in line]
    assert lines == ['flash = ["flash-attn>=2.8"]']
    for path in [*SCRIPTS, ROOT / "Makefile", ROOT / ".github" / "workflows" / "ci.yml"]:
        assert "flash" not in path.read_text(encoding="utf-8").lower().replace(
            "flash_attention", ""
        )


FAMILY_CHECKPOINTS = {"v1_5": "liuhaotian/llava-v1.5-7b", "v1_6": "liuhaotian/llava-v1.6-vicuna-7b"}
MAIN = ("vqav2", "gqa", "textvqa", "pope", "mme")
EVALUATION = sorted((ROOT / "scripts").glob("v1_*/*_eval/*.sh"))


def test_both_families_have_the_twelve_sets() -> None:
    for family in FAMILY_CHECKPOINTS:
        assert len(list((ROOT / "scripts" / family / "pdrop_eval").glob("*.sh"))) == 12


@pytest.mark.parametrize("script", EVALUATION, ids=_name)
def test_evaluation_scripts_name_their_own_family(script: Path) -> None:
    """Each command goes through the real parser; its checkpoint is of its folder's family, and a
    plan given by the user replaces nothing else."""
    for variables in ({}, {"REDUCTION": "none", "GPUS": "8", "CKPT": "mine", "BATCH_SIZE": "4"}):
        commands = _dry_run(script, "--limit", "5", **{"GPUS": "1", **variables})
        assert commands
        for command in commands:
            words = command[command.index("-m") + 1 :]
            if words[0] == "torch.distributed.run":
                assert words[words.index("--nproc_per_node") + 1] == "8"
                words = words[words.index("-m") + 1 :]
            assert words[0] == "llava.eval.run"
            args = run.parser().parse_args(words[1:])
            assert resolve_names(args.benchmarks)
            assert args.limit == 5
            expected = variables.get("CKPT", FAMILY_CHECKPOINTS[script.parts[-3]])
            assert args.model_path == expected
            if script.parent.name not in ("pdrop_eval", "yopo_eval"):  # its study's own plans
                plan_from_args(args).validate(32)
                continue
            asked = variables.get("REDUCTION")
            assert plan_from_args(args) == (None if asked is None else ReductionPlan())
            if asked is None:
                assert plan_for_model(args, None).cuts
                own = SimpleNamespace(visual_token_reduction=ReductionPlan().to_dict())
                assert plan_for_model(args, own) is None


@pytest.mark.parametrize(
    ("visible", "processes"), [(None, 4), ("2,5", 2), ("", 1), ("-1", 1), ("7", 1)]
)
def test_evaluation_starts_a_process_for_each_gpu_it_may_see(
    visible: str | None, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: CUDA_VISIBLE_DEVICES is not set."""
    for name in ("CUDA_VISIBLE_DEVICES", "GPUS", "LAUNCHER", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU %d: stand-in\\n' 0 1 2 3\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    (command,) = _dry_run(ROOT / "scripts" / "v1_5" / "pdrop_eval" / "pope.sh", **variables)
    found = "1"
    if "--nproc_per_node" in command:
        found = command[command.index("--nproc_per_node") + 1]
    assert int(found) == processes


def test_a_launcher_of_training_does_not_stop_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    script = ROOT / "scripts" / "v1_5" / "pdrop_eval" / "pope.sh"
    (usual,) = _dry_run(script, GPUS="2", LAUNCHER="")
    assert "--nproc_per_node" in usual
    for launcher in ("torchrun", "deepspeed"):
        assert _dry_run(script, GPUS="2", LAUNCHER=launcher) == [usual]
    (other,) = _dry_run(script, GPUS="2", LAUNCHER="srun --mpi none")
    assert other[:3] == ["srun", "--mpi", "none"]


def test_a_digits_training_that_fails_takes_the_one_beside_it_along(tmp_path: Path) -> None:
    """Two models are trained side by side: no process is left when one of them has ended badly."""
    started = tmp_path / "started"
    python = f"""#!/usr/bin/env bash
case "$*" in
  *"--reduction none"*) echo $$ >"{started}.new"; mv "{started}.new" "{started}"; exec sleep 60 ;;
  *--layer_list*) until [ -f "{started}" ]; do sleep 0.05; done; exit 1 ;;
esac
"""
    for name, text in {"python": python, "nproc": "#!/bin/sh\necho 2\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    result = subprocess.run(
        ["bash", "scripts/digits/train.sh"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            "WORK": str(work),
            "OUT": str(tmp_path / "out"),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(int(started.read_text()))


def _wait_for_the_end(process: int) -> None:
    """ProcessLookupError once the process is gone, within five seconds."""
    for _ in range(100):
        os.kill(process, 0)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def digits_as_official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits sets under the names of the benchmarks they imitate."""
    data = tmp_path_factory.mktemp("data")
    build.main(["--out", str(data), "--parts", "tokenizer", "eval"])
    digits, root = data / "eval" / "digits", data / "official"
    for name in MAIN:
        shutil.copytree(digits / name, root / {"mme": "MME"}.get(name, name))
    vqav2, textvqa = root / "vqav2", root / "textvqa"
    (vqav2 / "val2014").rename(vqav2 / "test2015")
    questions = vqav2 / "llava_vqav2_mscoco_val2014.jsonl"
    questions.rename(vqav2 / "llava_vqav2_mscoco_test-dev2015.jsonl")
    questions = textvqa / "llava_textvqa_val_v051.jsonl"
    questions.rename(textvqa / "llava_textvqa_val_v051_ocr.jsonl")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_the_main_scripts_run_on_the_digits(name: str, digits_as_official: Path, tmp_path: Path):
    """The scripts themselves, on a checkpoint whose own plan wins over the family's default."""
    result = subprocess.run(
        ["bash", f"scripts/v1_5/pdrop_eval/{name}.sh", "--limit", "36"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "CKPT": "checkpoints/llava-digits-pdrop",
            "GPUS": "1",
            "DATA_ROOT": str(digits_as_official),
            "RESULTS": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (answers,) = tmp_path.rglob("answers.jsonl")
    assert len(answers.read_text().splitlines()) >= 30
    settings = json.loads((answers.parent / "run.json").read_text())
    assert settings["plan"].startswith("pyramiddrop:layers=[2,4,5]")
    if name != "vqav2":  # test-dev answers are with the server
        scores = json.loads((answers.parent / "scores.json").read_text())
        assert scores["value"] > 60


# ----------------------------------------------------------------------------- sweeps and Slurm
PYRAMID = "pyramiddrop:layers=[2,4,5],ratios=[0.5,0.25,0.125]"
SRUN = """#!/usr/bin/env bash
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || exit
done
"""
# As Slurm does it: a copy of the script, run from elsewhere, whose shell is process 0 already.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$STUB_LOG"
last=0
while [ $# -gt 0 ]; do
  case $1 in
    --wrap) bash -c "$2" >&2; echo 8; exit ;;
    --array=*) last=${1##*-}; shift ;;
    --*) shift ;;
    *) break ;;
  esac
done
cp "$1" "$STUB_LOG.spool"
shift
cd /
for ((n = 0; n <= last; n++)); do
  SLURM_ARRAY_TASK_ID=$n SLURM_PROCID=0 SLURM_LOCALID=0 bash "$STUB_LOG.spool" "$@" >&2
done
echo "7;cluster"
"""


def _stub_slurm(folder: Path) -> dict[str, str]:
    """The environment of a machine whose srun and sbatch run everything here, two tasks a job."""
    for name, text in {"srun": SRUN, "sbatch": SBATCH}.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "STUB_LOG": str(folder / "log"),
        "PYTHON": sys.executable,
        "SLURM_NTASKS": "2",
    }


def test_a_sweep_takes_plans_from_arguments_and_a_file(tmp_path: Path) -> None:
    plans = tmp_path / "plans.txt"
    plans.write_text(f"# baseline first\n\n  {PYRAMID} \nfastv:k=2,r=0.5")
    variables = {"PLANS": str(plans), "BENCHMARKS": "pope mme", "CKPT": "mine", "GPUS": "1"}
    script = ROOT / "scripts" / "sweep.sh"
    check, *runs, report = _dry_run(script, "none", "--", "--limit", "5", **variables)
    assert check[1] == "-c"
    for command, plan in zip(runs, ("none", PYRAMID, "fastv:k=2,r=0.5"), strict=True):
        assert command[1:3] == ["-m", "llava.eval.run"]
        args = run.parser().parse_args(command[3:])
        assert (args.benchmarks, args.limit, args.model_path) == (["pope", "mme"], 5, "mine")
        assert plan_from_args(args) == ReductionPlan.parse(plan)
    assert report[1:3] == ["-m", "llava.eval.results_report"]
    assert results_report.parser().parse_args(report[3:]).results == ["results/sweep"]
    array, last = _dry_run(script, "none", SLURM="1", SBATCH_FLAGS="--account=me", **variables)[1:]
    assert array[2:] == ["--array=0-5", "--account=me", "scripts/slurm/eval.sbatch"]
    assert "--dependency=afterany:JOB" in last


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        ((), {"BENCHMARKS": "pope"}, "no plan"),
        (("none",), {}, "no benchmark"),
        (("none",), {"BENCHMARKS": "pope", "PLANS": "/nowhere"}, "no such file"),
        (("nosuch:k=1",), {"BENCHMARKS": "pope", "SLURM": "1"}, "nosuch"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_read(
    words: tuple[str, ...], variables: dict[str, str], error: str, tmp_path: Path
) -> None:
    """Before any job is made."""
    result = subprocess.run(
        ["bash", "scripts/sweep.sh", *words],
        cwd=ROOT,
        env={**_stub_slurm(tmp_path / "bin"), "RESULTS": str(tmp_path / "results"), **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert error in result.stderr
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "bin" / "log").exists()


@pytest.mark.slow
def test_a_slurm_sweep_ends_in_its_report(digits_as_official: Path, tmp_path: Path) -> None:
    """Two jobs of two processes each, under stand-ins for sbatch and srun, then the report."""
    results = tmp_path / "results"
    env = {
        **_stub_slurm(tmp_path / "bin"),
        "SLURM": "1",
        "BENCHMARKS": "pope",
        "CKPT": str(ROOT / "checkpoints" / "llava-digits"),
        "DATA_ROOT": str(digits_as_official),
        "RESULTS": str(results),
        "BATCH_SIZE": "18",
    }
    words = ["none", PYRAMID, "--", "--limit", "36"]
    result = subprocess.run(
        ["bash", "scripts/sweep.sh", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    runs = sorted((results / "pope").iterdir())
    assert [folder.name.split("-")[2] for folder in runs] == ["none", "pyramiddrop"]
    for folder in runs:
        ranks = {path.name for path in (folder / "shards").glob("answers.*")}
        assert ranks == {f"answers.rank000{i}.of0002.jsonl" for i in range(2)}
        assert len((folder / "answers.jsonl").read_text().splitlines()) == 36
    log = (tmp_path / "bin" / "log").read_text()
    assert "--array=0-1" in log
    assert "--dependency=afterany:7 " in log
    table = (results / "report.md").read_text()
    assert f"`{PYRAMID}`" in table
    assert (results / "report.html").is_file()


def test_a_job_out_of_time_goes_back_into_the_queue(tmp_path: Path) -> None:
    """Slurm's signal reaches the batch shell while its processes run."""
    env = {**_stub_slurm(tmp_path / "bin"), "SLURM_JOB_ID": "41", "LLAVA_ROOT": str(ROOT)}
    started = tmp_path / "started"
    srun = (
        f'#!/usr/bin/env bash\necho "$*" >"{started}.new"; mv "{started}.new" "{started}"\nsleep 2'
    )
    (tmp_path / "bin" / "srun").write_text(srun)
    (tmp_path / "bin" / "scontrol").write_text('#!/usr/bin/env bash\necho "$*" >"$STUB_LOG"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    command = ["bash", "scripts/slurm/eval.sbatch", "pope gqa", "--limit", "5"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 30
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        _, error = job.communicate(timeout=30)
    assert "back into the queue" in error
    assert (tmp_path / "bin" / "log").read_text() == "requeue 41\n"
    words = started.read_text().split()
    assert words[1:3] == ["-m", "llava.eval.run"]
    args = run.parser().parse_args(words[3:])
    assert (args.benchmarks, args.limit) == (["pope", "gqa"], 5)
