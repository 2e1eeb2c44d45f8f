#!/usr/bin/env bash
# PyramidDrop training against training without dropping: three seeds, five digits sets.
#
#   bash scripts/digits/compare.sh            about an hour on one undisturbed core
#   SMOKE=1 bash scripts/digits/compare.sh    every step of it on next to nothing
#
# All runs start from one stage 1 (captions and statements, trained without dropping: the stages
# align, facts and relations of train.sh). Stage 2 is two questions a picture (answers.json),
# COMPARE_STEPS steps of 64 pictures, the same recipe and the same order of samples in every arm:
#   none         without dropping
#   pyramiddrop  with the plan that llava-digits-pdrop ships with ($LAYERS, $RATIOS)
#   gentle       with the milder plan ($LAYERS, $EARLY_RATIOS); left out with GENTLE=0
# Each checkpoint answers with the plan it was trained with; the first two also with each other's.
# Runs that are done are skipped, an interrupted one resumes. The tables: docs/Digits.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/digits/lib.sh

if [ "$SMOKE" = 1 ]; then
  SEEDS=${SEEDS:-0 1} COMPARE_STEPS=${COMPARE_STEPS:-2} LIMIT=${LIMIT:-16}
else
  SEEDS=${SEEDS:-0 1 2} COMPARE_STEPS=${COMPARE_STEPS:-1200} LIMIT=${LIMIT:-}
fi
GENTLE=${GENTLE:-1}
HERE=$WORK/compare
PLAN_pyramiddrop="pyramiddrop:layers=$LAYERS,ratios=$RATIOS"
PLAN_gentle="pyramiddrop:layers=$LAYERS,ratios=$EARLY_RATIOS"
PLAN_none=none

# arm SEED NAME: stage 2 of one arm
arm() {
  local plan=PLAN_$2
  SEED=$1 BATCH=$((2 * BATCH)) stage "$HERE/seed-$1" "$2" "$WORK/none/relations" answers.json \
    mistral_instruct "$COMPARE_STEPS" 2e-3 --reduction "${!plan}"
}

# answers SEED NAME PLAN: the five sets, answered by the arm NAME with the plan of the arm PLAN
answers() {
  local plan=PLAN_$3 to=$HERE/seed-$1/results/$2-with-$3
  if [ -f "$to/rows.json" ]; then return; fi
  "$PYTHON" -m llava.cli eval digits --model-path "$HERE/seed-$1/$2" --data-root "$DATA/eval" \
    --reduction "${!plan}" --results "$to" --json "$to/rows.json" ${LIMIT:+--limit "$LIMIT"}
}

if [ ! -f "$WORK/none/relations/train_summary.json" ]; then
  shared
  captions none --reduction none
fi
"$PYTHON" -m llava.digits.build --out "$DATA" --seed 0 --parts eval
for seed in $SEEDS; do
  for name in none pyramiddrop; do
    arm "$seed" "$name"
    answers "$seed" "$name" none
    answers "$seed" "$name" pyramiddrop
  done
done
if [ "$GENTLE" = 1 ]; then
  for seed in $SEEDS; do
    arm "$seed" gentle
    answers "$seed" gentle gentle
  done
fi
