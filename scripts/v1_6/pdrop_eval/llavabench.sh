#!/usr/bin/env bash
# LLaVA-NeXT: LLaVA-Bench in the wild: answers; `llava judge` scores them.
#   [CKPT=...] [REDUCTION=none] bash scripts/v1_6/pdrop_eval/llavabench.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
run_eval liuhaotian/llava-v1.6-vicuna-7b "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]" llava_bench "$@"
