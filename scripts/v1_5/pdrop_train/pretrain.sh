#!/usr/bin/env bash
# LLaVA-1.5 stage 1 with PyramidDrop: the projector learns from image captions.
#
#   MODEL=/models/vicuna-7b-v1.5 bash scripts/v1_5/pdrop_train/pretrain.sh [more flags]
#   SIZE=13b REDUCTION=none bash scripts/v1_5/pdrop_train/pretrain.sh
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

default SIZE 7b
one_of SIZE 7b 13b
default MODEL "lmsys/vicuna-$SIZE-v1.5"
default DATA_PATH ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
default IMAGE_FOLDER ./playground/data/LLaVA-Pretrain/images
default OUTPUT_DIR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)-pretrain"
default SAVE_STEPS 24000

run_train 256 32 zero2 \
  --version plain \
  --tune_mm_mlp_adapter True \
  --learning_rate 1e-3 \
  --model_max_length 2048 \
  "$@"
