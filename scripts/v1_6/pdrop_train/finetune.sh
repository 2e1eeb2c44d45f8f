#!/usr/bin/env bash
# LLaVA-NeXT stage 2 with PyramidDrop: everything learns from instructions on tiled pictures, the
# tower too, ten times slower (Open-LLaVA-NeXT's recipe).
#
#   bash scripts/v1_6/pdrop_train/finetune.sh [more flags]             Vicuna-7B, 4,096 tokens
#   SIZE=8b bash scripts/v1_6/pdrop_train/finetune.sh                  Llama-3-8B-Instruct, 6,144
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

default SIZE 7b
one_of SIZE 7b 8b
case $SIZE in
  7b) base=lmsys/vicuna-7b-v1.5 version=v1 length=4096 save=50000 ;;
  8b) base=meta-llama/Meta-Llama-3-8B-Instruct version=llava_llama_3 length=6144 save=7975 ;;
esac
default MODEL "$base"
default PROJECTOR "./checkpoints/llava-next-$SIZE$(plan_suffix)-pretrain/mm_projector.bin"
default DATA_PATH ./playground/data/open-llava-next_instruct_mix1M.json
default IMAGE_FOLDER ./playground/data
default OUTPUT_DIR "./checkpoints/llava-next-$SIZE$(plan_suffix)"
default SAVE_STEPS "$save"

run_stage_2 128 4 zero2 \
  --version "$version" \
  --unfreeze_mm_vision_tower True \
  --mm_vision_tower_lr 2e-6 \
  --image_aspect_ratio anyres \
  --mm_patch_merge_type spatial_unpad \
  --group_by_modality_length True \
  --learning_rate 2e-5 \
  --model_max_length "$length" \
  "$@"
