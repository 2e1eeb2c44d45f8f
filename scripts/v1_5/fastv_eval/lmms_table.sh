#!/usr/bin/env bash
# FastV's table of captions and benchmarks: K = 3, R = 50 %, and the baseline.
#   [CKPT=...] bash scripts/v1_5/fastv_eval/lmms_table.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
run_plans liuhaotian/llava-v1.5-7b \
  "nocaps coco2014_val coco2017_val flickr30k gqa seed_bench mmmu mme" \
  none "fastv:k=3,r=0.5"
