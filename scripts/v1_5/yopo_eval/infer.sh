#!/usr/bin/env bash
# YOPO's table: a checkpoint fine-tuned with it (its plan is in config.json) on seven sets.
#   CKPT=... [REDUCTION="yopo:layers=16,heads=mask.npy,window=5,ffn=2"] \
#       bash scripts/v1_5/yopo_eval/infer.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
run_eval liuhaotian/llava-v1.5-7b "yopo:layers=16,heads=0.5,window=5,ffn=2" \
  "gqa vqav2 scienceqa textvqa_ocr pope mme mmbench" "${FLAGS[@]}"
