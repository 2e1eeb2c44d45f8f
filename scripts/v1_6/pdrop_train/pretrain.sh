#!/usr/bin/env bash
# LLaVA-NeXT stage 1 with PyramidDrop: the projector and the image newline learn from captions of
# tiled pictures (Open-LLaVA-NeXT's recipe).
#
#   bash scripts/v1_6/pdrop_train/pretrain.sh [more flags]             Vicuna-7B, 4,096 tokens
#   SIZE=8b bash scripts/v1_6/pdrop_train/pretrain.sh                  Llama-3-8B-Instruct, 6,144
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

default SIZE 7b
one_of SIZE 7b 8b
case $SIZE in
  7b) base=lmsys/vicuna-7b-v1.5 length=4096 ;;
  8b) base=meta-llama/Meta-Llama-3-8B-Instruct length=6144 ;;
esac
default MODEL "$base"
default DATA_PATH ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
default IMAGE_FOLDER ./playground/data/LLaVA-Pretrain/images
default OUTPUT_DIR "./checkpoints/llava-next-$SIZE$(plan_suffix)-pretrain"

run_train 256 8 zero2 \
  --version plain \
  --tune_mm_mlp_adapter True \
  --image_aspect_ratio anyres \
  --mm_patch_merge_type spatial_unpad \
  --learning_rate 1e-3 \
  --model_max_length "$length" \
  "$@"
