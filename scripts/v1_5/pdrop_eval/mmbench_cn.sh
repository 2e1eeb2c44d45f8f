#!/usr/bin/env bash
# LLaVA-1.5: MMBench-CN dev: answers and the file for the server.
#   [CKPT=...] [REDUCTION=none] bash scripts/v1_5/pdrop_eval/mmbench_cn.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
run_eval liuhaotian/llava-v1.5-7b "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]" mmbench_cn "$@"
