#!/usr/bin/env bash
# Simignore on ScienceQA over K (tokens the text keeps) and R (layer and tokens of FastV's cut).
#   [KEEPS="500 452 400 300"] [LAYERS="3 5 8"] [RANKS="288 144 72"] [CKPT=...] \
#       bash scripts/v1_5/simignore_eval/sqa_study.sh [flags of llava eval]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
FLAGS=("$@")
plans=(none)
for keep in ${KEEPS:-500 452 400 300}; do
  plans+=("simignore:keep=$keep,text=options")
  for k in ${LAYERS:-3 5 8}; do
    for rank in ${RANKS:-288 144 72}; do
      plans+=("simignore:keep=$keep,text=options+fastv:k=$k,keep=$rank")
    done
  done
done
run_plans liuhaotian/llava-v1.5-7b scienceqa "${plans[@]}"
