#!/usr/bin/env bash
# AdaptPrune behind layer 2 with 50, 25 and 10 % of the tokens, FastV at the same budgets beside it.
#   [CKPT=...] bash scripts/v1_5/adaptprune_eval/table.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
plans=(none)
for keep in 0.5 0.25 0.1; do
  plans+=("adaptprune:k=2,keep=$keep" "fastv:k=2,r=$(awk "BEGIN { print 1 - $keep }")")
done
run_plans liuhaotian/llava-v1.5-7b \
  "vqav2 gqa scienceqa textvqa_ocr pope mme mmbench seed_bench" "${plans[@]}"
