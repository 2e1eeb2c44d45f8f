#!/usr/bin/env bash
# Several plans on several benchmarks, ending in one report.
#
#   CKPT=... BENCHMARKS="pope gqa mme" bash scripts/sweep.sh PLAN... [-- flags of llava eval]
#   CKPT=... BENCHMARKS="pope gqa mme" PLANS=plans.txt bash scripts/sweep.sh
#   SLURM=1 ... bash scripts/sweep.sh ...     the same as a Slurm array, one job a plan and benchmark
#
# PLANS=FILE        one plan a line; empty lines and lines that begin with # do not count
# RESULTS=DIR       where the runs and report.{html,md,csv} go (default results/sweep)
# SBATCH_FLAGS=...  more flags for sbatch, such as "--partition=gpu --account=me"
# CKPT, MODEL_BASE, CONV_MODE, GPUS, BATCH_SIZE, DATA_ROOT, DRY_RUN: see scripts/lib.sh
#
# Runs that are complete are not run again, those that were killed go on: repeat the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
PY=${PY:-${PYTHON:-python}}
export RESULTS=${RESULTS:-results/sweep}
MODEL=${CKPT:-liuhaotian/llava-v1.5-7b}

plans=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do plans+=("$1"); shift; done
[ "${1:-}" = -- ] && shift
FLAGS=("$@")
if [ -n "${PLANS:-}" ]; then
  [ -f "$PLANS" ] || die "PLANS=$PLANS: no such file"
  while IFS= read -r line || [ -n "$line" ]; do
    line=$(sed 's/^[[:space:]]*//; s/[[:space:]]*$//' <<<"$line")
    case "$line" in "" | "#"*) ;; *) plans+=("$line") ;; esac
  done <"$PLANS"
fi
[ ${#plans[@]} -gt 0 ] || die "no plan: give plans as arguments or PLANS=FILE"
[ -n "${BENCHMARKS:-}" ] || die 'no benchmark: set BENCHMARKS="pope gqa ..."'
read -ra benchmarks <<<"$BENCHMARKS"

# A name that cannot be read ends everything here, before a job is made of it.
run "$PY" -c 'import sys
from llava.eval.benchmarks import resolve_names
from llava.reduction import ReductionPlan
from llava.utils import user_errors
count = int(sys.argv[1])
with user_errors():
    plans = [ReductionPlan.parse(text) for text in sys.argv[2 : 2 + count]]
    names = resolve_names(sys.argv[2 + count :])' \
  "${#plans[@]}" "${plans[@]}" "${benchmarks[@]}"

REPORT=(-m llava.eval.results_report "$RESULTS" --out "$RESULTS/report.html"
  --markdown "$RESULTS/report.md" --csv "$RESULTS/report.csv")

if [ "${SLURM:-0}" != 1 ]; then
  run_plans "$MODEL" "$BENCHMARKS" "${plans[@]}"
  run "$PY" "${REPORT[@]}"
  exit 0
fi

# One line a job: plan, tab, benchmark. The jobs read theirs by their number.
cd "$ROOT"
grid=$RESULTS/sweep.$(date +%Y%m%d-%H%M%S).$$.tsv
lines() {
  local plan benchmark
  for plan in "${plans[@]}"; do
    for benchmark in "${benchmarks[@]}"; do printf '%s\t%s\n' "$plan" "$benchmark"; done
  done
}
if [ "$DRY_RUN" != 1 ]; then
  mkdir -p "$RESULTS"
  lines >"$grid"
fi
read -ra more <<<"${SBATCH_FLAGS:-}"
last=$((${#plans[@]} * ${#benchmarks[@]} - 1))
export CKPT=$MODEL LLAVA_ROOT=$ROOT SWEEP=$grid PY
array=(sbatch --parsable "--array=0-$last" "${more[@]}" scripts/slurm/eval.sbatch "${FLAGS[@]}")
if [ "$DRY_RUN" = 1 ]; then
  run "${array[@]}"
  job=JOB
else
  job=$("${array[@]}")
  say "job $job: $((last + 1)) runs, listed in $grid"
fi
# The report names what is not finished, so it is made whatever became of the runs.
printf -v words '%q ' "$PY" "${REPORT[@]}"
run sbatch --parsable "--dependency=afterany:${job%%;*}" --job-name=llava-report --ntasks=1 \
  "${more[@]}" --wrap "cd $(printf %q "$ROOT") && $words"
