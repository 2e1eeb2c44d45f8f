#!/usr/bin/env bash
# FastV's A-OKVQA table: accuracy, time to the first token and memory, in 16 and in 4 bits.
#   [CKPT=...] [BITS="16 4"] bash scripts/v1_5/fastv_eval/aokvqa_latency.sh [flags of llava eval]
#
# The time is in the last line of each run and in its run.json. Questions do not share their prefill
# here, as in the original; one at a time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
for bits in ${BITS:-16 4}; do
  FLAGS=(--no-share --batch-size 1 "$@")
  [ "$bits" = 4 ] && FLAGS+=(--load-4bit)
  run_plans liuhaotian/llava-v1.5-7b aokvqa \
    none "fastv:k=2,r=0.25" "fastv:k=2,r=0.5" "fastv:k=2,r=0.75"
done
