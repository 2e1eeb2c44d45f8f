# Shared by the scripts of this folder: `source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"`.
#
#   setup_env EXTRAS   a Python with everything in it; its path in $PY (EXTRAS e.g. "eval,train")
#   run COMMAND...     runs the command from the repository root; DRY_RUN=1 prints it instead
#   run_eval MODEL PLAN BENCHMARK [FLAGS...]
#                      answers and scores a benchmark (or "A B C"); MODEL and PLAN are defaults
#   run_plans MODEL BENCHMARKS PLAN...
#                      the same with each of several plans; FLAGS=(...) go to llava eval
#
# Variables a user may set for run_eval:
#   CKPT=...         the checkpoint (folder or hub id); MODEL_BASE=... its base, for LoRA
#   REDUCTION=...    a plan, "none" for the baseline; or LAYER_LIST=... and RATIO_LIST=... (PyramidDrop).
#                    Without them the checkpoint's own plan, else the family's.
#   CONV_MODE=...    the template; without it the checkpoint's
#   GPUS=N           processes, one a GPU (default: all visible GPUs, else one process)
#   LAUNCHER=...     a command that starts the processes instead, such as "srun"; torchrun and
#                    deepspeed, which training knows, mean what happens without it
#   BATCH_SIZE=...  DATA_ROOT=...  RESULTS=...   see llava eval --help
#
# Variables a user may set:
#   NO_VENV=1        use the present Python environment instead of making .venv
#   VENV=DIR         where the virtual environment is (default .venv)
#   PYTHON=...       the interpreter to start from (default python3, then python)
#   TORCH_SPEC=...   what to hand to pip for torch (default: the version in constraints.txt)
#   ALLOW_CUDA=1     take torch's CUDA build where no CPU build can be had
#   DRY_RUN=1        install and run nothing, print the commands
#
# Nothing touches the network once the packages are there.

LIB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LIB_DIR")
PY=${PY:-}
DRY_RUN=${DRY_RUN:-0}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"; echo
  else
    (cd "$ROOT" && "$@")
  fi
}

# The interpreter to start from: at least Python 3.10.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python python3.12 python3.11 python3.10; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  die "no Python of at least 3.10 found; name one with PYTHON=/path/to/python3"
}

# Not grep -q, which leaves early: with pipefail the pipe would sometimes count as broken.
has_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep GPU >/dev/null
}

has_torch() {
  "$PY" -c 'import sys, torch
sys.exit(tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11))' \
    >/dev/null 2>&1
}

# Exit status 0 if every requirement of the extras $1 is there already. Reads no network.
has_packages() {
  "$PY" - "$ROOT/pyproject.toml" "$1" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata as metadata
import sys

try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

path, extras = sys.argv[1:]
with open(path, "rb") as file:
    project = tomllib.load(file)["project"]
wanted = list(project["dependencies"])
for extra in filter(None, extras.split(",")):
    wanted += project["optional-dependencies"][extra]
for line in wanted:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    if not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
        sys.exit(f"{requirement} is not met")
PYTHON
}

pip_install() { "$PY" -m pip install --disable-pip-version-check --quiet "$@"; }

# torch: kept if there; with a GPU the default build; without one a CPU build, looked for first
# where pip is configured to look, then in PyTorch's own index. A build that brings gigabytes of
# CUDA packages is never taken by surprise.
install_torch() {
  if has_torch; then
    say "torch $("$PY" -c 'import torch; print(torch.__version__)') is there: kept"
    return 0
  fi
  local spec=${TORCH_SPEC:-$(grep -E '^torch==' "$ROOT/constraints.txt")}
  say "installing $spec"
  if has_gpu; then
    pip_install "$spec"
    return
  fi
  case $spec in
    torch==*+*) ;;
    torch==*) pip_install "$spec+cpu" >/dev/null 2>&1 && return 0 ;;
  esac
  local plan
  if plan=$("$PY" -m pip install --disable-pip-version-check --dry-run "$spec" 2>/dev/null) &&
    ! grep -qiE '(nvidia|cuda|triton)' <<<"$plan"; then
    pip_install "$spec"
    return
  fi
  say "trying PyTorch's CPU index"
  if pip_install --timeout 20 --retries 1 --index-url https://download.pytorch.org/whl/cpu "$spec"
  then
    return 0
  fi
  if [ "${ALLOW_CUDA:-0}" = 1 ] && [ -n "$plan" ]; then
    say "no CPU build found: taking the default one with its CUDA packages (ALLOW_CUDA=1)"
    pip_install "$spec"
    return
  fi
  die "no CPU build of $spec can be reached. Either install torch yourself and run this again" \
    "with NO_VENV=1, or set ALLOW_CUDA=1 to take the default build with its CUDA packages"
}

# setup_env EXTRAS: makes or finds the environment and puts its interpreter into $PY.
setup_env() {
  local extras=$1 venv=${VENV:-$ROOT/.venv}
  if [ "$DRY_RUN" = 1 ]; then
    PY=python
    return 0
  fi
  if [ "${NO_VENV:-0}" = 1 ]; then
    PY=$(find_python) || exit 2
  else
    if [ ! -x "$venv/bin/python" ]; then
      local base
      base=$(find_python) || exit 2
      say "making $venv with $base"
      "$base" -m venv "$venv" || die "could not make $venv (on Debian: apt install python3-venv)"
    fi
    PY=$venv/bin/python
  fi
  if has_torch && has_packages "$extras"; then
    say "packages are there: nothing to install"
    return 0
  fi
  install_torch || die "installing torch failed"
  install_extras "$extras" || die "pip install failed"
}

# This package in place, with the extras $1, in the versions of constraints.txt.
install_extras() {
  local constraints status=0
  say "installing llava[$1]"
  constraints=$(mktemp)
  constraints_for_torch >"$constraints"
  pip_install -c "$constraints" -e "$ROOT[$1]" || status=$?
  rm -f "$constraints"
  return "$status"
}

# constraints.txt with the torch that is installed, so that pip does not replace it.
constraints_for_torch() {
  grep -vE '^torch==' "$ROOT/constraints.txt"
  "$PY" -c 'import torch; print("torch==" + torch.__version__)'
}

# How many GPUs are to be seen here: those of CUDA_VISIBLE_DEVICES where it is set, be it empty or -1.
gpus_here() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv -e '^$' -e '^-' || true
  elif has_gpu; then
    nvidia-smi -L | grep -c GPU
  else
    echo 0
  fi
}

# launch MODULE FLAGS...: one process, or one a GPU. Under srun each task is a process already;
# LAUNCHER=srun starts them, from a batch script.
launch() {
  local processes=${GPUS:-} starter
  case ${LAUNCHER:-} in torchrun | deepspeed) starter=() ;; *) read -ra starter <<<"${LAUNCHER:-}" ;; esac
  if ((${#starter[@]})); then
    run "${starter[@]}" "$PY" -m "$@"
    return
  fi
  [ -n "$processes" ] || processes=$(gpus_here)
  if [ -n "${SLURM_PROCID:-}" ] || [ "$processes" -le 1 ]; then
    run "$PY" -m "$@"
  else
    run "$PY" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m "$@"
  fi
}

run_eval() {
  local model=${CKPT:-$1} plan=$2 benchmark=$3
  shift 3
  PY=${PY:-${PYTHON:-python}}
  local flags=(--model-path "$model" --default-reduction "$plan")
  [ -n "${MODEL_BASE:-}" ] && flags+=(--model-base "$MODEL_BASE")
  [ -n "${REDUCTION:-}" ] && flags+=(--reduction "$REDUCTION")
  [ -n "${LAYER_LIST:-}" ] && flags+=(--layer_list "$LAYER_LIST")
  [ -n "${RATIO_LIST:-}" ] && flags+=(--image_token_ratio_list "$RATIO_LIST")
  [ -n "${CONV_MODE:-}" ] && flags+=(--conv-mode "$CONV_MODE")
  [ -n "${BATCH_SIZE:-}" ] && flags+=(--batch-size "$BATCH_SIZE")
  [ -n "${DATA_ROOT:-}" ] && flags+=(--data-root "$DATA_ROOT")
  [ -n "${RESULTS:-}" ] && flags+=(--results "$RESULTS")
  local names
  read -ra names <<<"$benchmark"
  launch llava.eval.run "${names[@]}" "${flags[@]}" "$@"
}

run_plans() {
  local model=$1 benchmarks=$2 plan
  shift 2
  for plan in "$@"; do
    REDUCTION=$plan run_eval "$model" none "$benchmarks" "${FLAGS[@]}"
  done
}
