#!/usr/bin/env bash
# Simignore's ScienceQA figures: the settings of its two scripts, by the size of the model.
#   [SIZE=7b|13b] [CKPT=...] bash scripts/v1_5/simignore_eval/sqa.sh [flags of llava eval]
#
# The published runs had 4-bit weights: add --load-4bit.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
SIZE=${SIZE:-7b}
case "$SIZE" in
  7b) plan="simignore:preset=7b+fastv:k=5,keep=144" ;;
  13b) plan="simignore:preset=13b+fastv:k=4,keep=144" ;;
  *) die "SIZE=$SIZE; accepted: 7b, 13b" ;;
esac
run_plans "liuhaotian/llava-v1.5-$SIZE" scienceqa none "$plan"
