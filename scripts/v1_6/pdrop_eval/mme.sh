#!/usr/bin/env bash
# LLaVA-NeXT: MME perception and cognition.
#   [CKPT=...] [REDUCTION=none] bash scripts/v1_6/pdrop_eval/mme.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
run_eval liuhaotian/llava-v1.6-vicuna-7b "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]" mme "$@"
