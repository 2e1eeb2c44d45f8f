#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with YOPO: visual tokens run on few heads, half the neurons and half the layers.
# Stage 1 is the ordinary one.
#
#   HEADS=headmask/13b_30.npy bash scripts/v1_5/finetune_yopo.sh [more flags]
#   SIZE=7b HEADS=headmask.npy LAYERS=16 bash scripts/v1_5/finetune_yopo.sh
#   MODE=leaky HEADS=... bash scripts/v1_5/finetune_yopo.sh            the original's simulation
#
# HEADS is a head mask, made by `llava calibrate-heads` or the original's; REDUCTION replaces the
# whole plan. The plan goes into the checkpoint.
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../train_lib.sh"

default SIZE 13b
one_of SIZE 7b 13b
default MODEL "lmsys/vicuna-$SIZE-v1.5"
default LAYERS "$([ "$SIZE" = 7b ] && echo 16 || echo 20)"
default HEADS ""
if [ -z "${REDUCTION:-}" ]; then
  [ -n "$HEADS" ] || die "HEADS=... is missing: a head mask, see llava calibrate-heads --help"
  REDUCTION="yopo:layers=$LAYERS,heads=$HEADS,window=5,ffn=2,mode=${MODE:-renorm}"
fi
default PROJECTOR "./checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin"
default DATA_PATH ./playground/data/llava_v1_5_mix665k.json
default IMAGE_FOLDER ./playground/data
default OUTPUT_DIR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)"

run_stage_2 128 8 zero3 \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --learning_rate 2e-5 \
  --model_max_length 1560 \
  "$@"
