#!/usr/bin/env bash
# LLaVA-1.5 stage 1 with PyramidDrop: the projector learns from image captions.
#
#   MODEL=/models/vicuna-7b-v1.5 bash scripts/v1_5/pdrop_train/pretrain.sh [more flags]
#
# REDUCTION=none     the same recipe without dropping (any plan may stand here)
# MODEL, VISION_TOWER, DATA_PATH, IMAGE_FOLDER, OUTPUT_DIR   where things are
# BATCH, ACCUMULATE  samples a step = BATCH * ACCUMULATE; LLaVA's recipe has 256
# DRY_RUN=1          print the command
# One process on one GPU (or the CPU). Further flags override those below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../lib.sh"
PY=${PY:-python}

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
plan=(--layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]")
[ -n "${REDUCTION:-}" ] && plan=(--reduction "$REDUCTION")

run "$PY" -m llava.train.train_mem_pdrop \
  --model_name_or_path "$MODEL" \
  --version plain \
  --data_path "${DATA_PATH:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
  --image_folder "${IMAGE_FOLDER:-./playground/data/LLaVA-Pretrain/images}" \
  --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
  --mm_projector_type mlp2x_gelu \
  --tune_mm_mlp_adapter True \
  --mm_vision_select_layer -2 \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  "${plan[@]}" \
  --bf16 True \
  --output_dir "${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-pdrop-pretrain}" \
  --num_train_epochs 1 \
  --per_device_train_batch_size "${BATCH:-32}" \
  --per_device_eval_batch_size 4 \
  --gradient_accumulation_steps "${ACCUMULATE:-8}" \
  --evaluation_strategy no \
  --save_strategy steps \
  --save_steps 24000 \
  --save_total_limit 1 \
  --learning_rate 1e-3 \
  --weight_decay 0. \
  --warmup_ratio 0.03 \
  --lr_scheduler_type cosine \
  --logging_steps 1 \
  --tf32 True \
  --model_max_length 2048 \
  --gradient_checkpointing True \
  --dataloader_num_workers 4 \
  --lazy_preprocess True \
  --report_to wandb \
  "$@"
