#!/usr/bin/env bash
# FastV's ablation of K and R on OCR-VQA.
#   [CKPT=...] bash scripts/v1_5/fastv_eval/ocrvqa_ablation.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
plans=(none)
for k in 1 2 5 10 15 20; do
  for r in 0.25 0.5 0.75 0.875; do plans+=("fastv:k=$k,r=$r"); done
done
run_plans liuhaotian/llava-v1.5-7b ocrvqa "${plans[@]}"
