#!/usr/bin/env bash
# PyramidDrop training against training without dropping: three seeds, five digits sets.
#
#   bash scripts/digits/compare.sh            about four hours on one core
#   SMOKE=1 bash scripts/digits/compare.sh    every step of it on next to nothing
#
# Three comparisons, all of stage 2 from one stage 1 that was trained without dropping, on two
# questions a picture (answers.json) and steps of 64 pictures:
#   learn   stage 1 knows captions and statements (train.sh's align, facts, relations), and stage 2
#           learns all questions: LEARN_STEPS at the learning rate of train.sh's questions
#   adapt   stage 1 knows the questions too (train.sh's questions), and stage 2 is train.sh's last
#           stage, shortened: ADAPT_STEPS
#   full    the same, not shortened: ANSWER_STEPS
# Within a seed all arms see the same samples in the same order by the same recipe:
#   none         without dropping
#   pyramiddrop  with the plan that llava-digits-pdrop ships with ($LAYERS, $RATIOS)
#   mild         with the plan of train.sh's earlier stages ($EARLY_RATIOS); not in learn
# Each answers with its own plan and with all tokens, `none` with every plan. Runs that are done are
# skipped, an interrupted one resumes. COMPARISONS=learn runs one of the three.
# The tables: docs/Digits.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/digits/lib.sh

if [ "$SMOKE" = 1 ]; then
  SEEDS=${SEEDS:-0 1} LEARN_STEPS=${LEARN_STEPS:-2} ADAPT_STEPS=${ADAPT_STEPS:-2}
  LIMIT=${LIMIT:-16} REPEATS=${REPEATS:-1}
else
  SEEDS=${SEEDS:-0 1 2} LEARN_STEPS=${LEARN_STEPS:-1200} ADAPT_STEPS=${ADAPT_STEPS:-700}
  LIMIT=${LIMIT:-} REPEATS=${REPEATS:-10}
fi
HERE=$WORK/compare
PLAN_none=none
PLAN_pyramiddrop="pyramiddrop:layers=$LAYERS,ratios=$RATIOS"
PLAN_mild="pyramiddrop:layers=$LAYERS,ratios=$EARLY_RATIOS"

# arm WHAT SEED NAME: stage 2 of one arm
arm() {
  local plan=PLAN_$3 base=relations steps=$LEARN_STEPS rate=2e-3
  case "$1" in
    adapt) base=questions steps=$ADAPT_STEPS rate=8e-4 ;;
    full) base=questions steps=$ANSWER_STEPS rate=8e-4 ;;
  esac
  SEED=$2 stage "$HERE/$1/seed-$2" "$3" "$WORK/none/$base" answers.json mistral_instruct \
    "$steps" "$rate" --reduction "${!plan}"
}

# answers WHAT SEED NAME PLAN: the five sets, answered by the arm NAME with the plan of the arm PLAN
answers() {
  local plan=PLAN_$4 run=$HERE/$1/seed-$2 to=$HERE/$1/seed-$2/results/$3-with-$4
  if [ -f "$to/rows.json" ]; then return; fi
  "$PYTHON" -m llava.cli eval digits --model-path "$run/$3" --data-root "$DATA/eval" \
    --reduction "${!plan}" --results "$to" --json "$to/rows.json" ${LIMIT:+--limit "$LIMIT"}
}

if [ ! -f "$WORK/none/questions/train_summary.json" ]; then
  shared
  captions none --reduction none
  questions none --reduction none
fi
"$PYTHON" -m llava.digits.build --out "$DATA" --seed 0 --parts eval
BATCH=$((2 * BATCH))
for what in ${COMPARISONS:-adapt full learn}; do
  case "$what" in
    learn) plans="pyramiddrop" ;;
    adapt | full) plans="pyramiddrop mild" ;;
    *) echo "COMPARISONS: $what; accepted: adapt, full, learn" >&2; exit 2 ;;
  esac
  for seed in $SEEDS; do
    for name in none $plans; do
      arm "$what" "$seed" "$name"
      answers "$what" "$seed" "$name" "$name"
    done
  done
  for seed in $SEEDS; do
    for name in $plans; do
      answers "$what" "$seed" none "$name"
      answers "$what" "$seed" "$name" none
    done
  done
done
if [ ! -f "$HERE/cost.json" ]; then
  "$PYTHON" scripts/digits/compare_cost.py "$HERE" --repeats "$REPEATS"
fi
"$PYTHON" scripts/digits/compare_table.py "$HERE"
