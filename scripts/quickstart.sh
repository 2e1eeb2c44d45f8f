#!/usr/bin/env bash
# From a fresh CPU machine to one page of accuracy, FLOPs and measured speed:
#
#   bash scripts/quickstart.sh
#
# makes .venv (NO_VENV=1 uses the present Python), installs what is missing, builds the digits data,
# evaluates both shipped checkpoints with and without dropping visual tokens, prints one table and
# writes results/quickstart/{summary.json,index.html}. About five minutes on two cores after the
# install; FULL=1 takes all questions. Further flags go to `llava quickstart`, see
# `llava quickstart --help`; scripts/lib.sh names the other variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setup_env eval

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
full=()
[ "${FULL:-0}" = 1 ] && full=(--full)
run "$PY" -m llava.cli quickstart ${full[@]+"${full[@]}"} "$@"
