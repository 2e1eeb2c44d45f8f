#!/usr/bin/env bash
# Trains the tiny LLaVAs on the digits from nothing: data, tokenizer, tower, base, captions, questions.
#
#   bash scripts/digits/train.sh                    both checkpoints
#   PLAN=none        bash scripts/digits/train.sh   checkpoints/llava-digits only
#   PLAN=pyramiddrop bash scripts/digits/train.sh   checkpoints/llava-digits-pdrop only
#   SMOKE=1          bash scripts/digits/train.sh   every stage for a few steps
#
# Stages that are done are skipped, an interrupted one resumes from its last checkpoint. The two
# share data, tower and base and are trained side by side where two cores are; one thread each
# (THREADS); seeds are fixed.
# What is learned when, and how long it takes: docs/Digits.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/digits/lib.sh

PLAN=${PLAN:-both}
case "$PLAN" in
  both | none | pyramiddrop) ;;
  *) echo "error: PLAN=$PLAN; accepted: both, none, pyramiddrop" >&2; exit 2 ;;
esac

# The stages of one model: stages PLAN [plan flags]. With PyramidDrop every stage drops, from the
# first step on: gently until the questions are known, with the final ratios in the last stage.
stages() {
  captions "$@"
  questions "$@"
}

# shipped PLAN NAME [last stages]: the folder of one checkpoint
shipped() {
  local plan=$1 name=$2 run=$WORK/$1; shift 2
  "$PYTHON" -m llava.digits.finish \
    --stages "$run/align" "$run/facts" "$run/relations" "$run/questions" "$@" \
    --tower "$WORK/tower" --base "$WORK/base" --plan "$plan" --out "$OUT/$name"
}

complete() {
  [ -f "$OUT/$1/training.json" ] || return 1
  echo "$OUT/$1 is complete; delete it to train again"
}

plain() {
  complete llava-digits && return
  shared
  stages none --reduction none
  shipped none llava-digits
}

dropped() {
  complete llava-digits-pdrop && return
  shared
  local run=$WORK/pyramiddrop
  stages pyramiddrop --layer_list "$LAYERS" --image_token_ratio_list "$EARLY_RATIOS"
  BATCH=$((2 * BATCH)) stage "$run" answers "$run/questions" answers.json mistral_instruct \
    "$ANSWER_STEPS" 8e-4 \
    --layer_list "$LAYERS" --image_token_ratio_list "$RATIOS"
  shipped pyramiddrop llava-digits-pdrop "$run/answers"
}

case "$PLAN" in
  none) plain ;;
  pyramiddrop) dropped ;;
  both)
    if complete llava-digits && complete llava-digits-pdrop; then
      exit 0
    elif [ "$(nproc)" -lt 2 ]; then
      plain
      dropped
    else
      shared
      echo "training llava-digits beside it: $WORK/none.log"
      set -m  # a process group of its own, so that its Python ends with it
      plain >"$WORK/none.log" 2>&1 &
      other=$!
      set +m
      trap 'kill -- "-$other" 2>/dev/null || true' EXIT
      dropped
      wait "$other" || { tail -5 "$WORK/none.log" >&2; exit 1; }
    fi
    ;;
esac
