#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes, on 1 to 8 NVIDIA GPUs; downloads nothing.
#
#   bash scripts/gpu_check.sh [--json FILE]
#
# Recorded cases in float32 and bfloat16 with every installed attention backend, generation and a
# training step at 7B shape (random weights), `llava bench` for LLaVA-1.5 and NeXT, two-rank ZeRO-2
# and ZeRO-3 where two GPUs are there. Prints a pass/fail table and writes
# docs/benchmarks/gpu_check_<GPU>.json. Exit status: 0 nothing failed, 1 something did, 2 no GPU.
# PY=... names the interpreter (default .venv, else python); DRY_RUN=1 prints the commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [ -z "$PY" ]; then
  PY=python
  [ -x "$ROOT/.venv/bin/python" ] && PY=$ROOT/.venv/bin/python
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
cd "$ROOT"
if [ "$DRY_RUN" = 1 ]; then
  exec "$PY" tests/gpu/gpu_check.py --dry-run
fi
has_gpu || die "there is no NVIDIA GPU here (nvidia-smi finds none); nothing was checked"
exec "$PY" tests/gpu/gpu_check.py "$@"
