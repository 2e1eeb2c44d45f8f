#!/usr/bin/env bash
# Trains the tiny LLaVAs on the digits from nothing: data, tokenizer, tower, base, captions, questions.
#
#   bash scripts/digits/train.sh                    both checkpoints
#   PLAN=none        bash scripts/digits/train.sh   checkpoints/llava-digits only
#   PLAN=pyramiddrop bash scripts/digits/train.sh   checkpoints/llava-digits-pdrop only
#   SMOKE=1          bash scripts/digits/train.sh   every stage for a few steps
#
# Stages that are done are skipped, an interrupted one resumes from its last checkpoint. The two
# share data, tower and base and are trained side by side where two cores are; one thread each
# (THREADS); seeds are fixed.
# What is learned when, and how long it takes: docs/Digits.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PLAN=${PLAN:-both}
SMOKE=${SMOKE:-0}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
export OMP_NUM_THREADS=${THREADS:-1}

case "$PLAN" in
  both | none | pyramiddrop) ;;
  *) echo "error: PLAN=$PLAN; accepted: both, none, pyramiddrop" >&2; exit 2 ;;
esac

if [ "$SMOKE" = 1 ]; then
  DATA=${DATA:-playground/data/smoke} WORK=${WORK:-checkpoints/smoke/work}
  OUT=${OUT:-checkpoints/smoke}
  PICTURES=64 TOWER_STEPS=4 BASE_STEPS=4 BATCH=4
  ALIGN_STEPS=3 FACT_STEPS=3 RELATION_STEPS=3 QUESTION_STEPS=3 ANSWER_STEPS=3
else
  DATA=${DATA:-playground/data} WORK=${WORK:-checkpoints/digits-work} OUT=${OUT:-checkpoints}
  PICTURES=${PICTURES:-12000} TOWER_STEPS=${TOWER_STEPS:-2000} BASE_STEPS=${BASE_STEPS:-400}
  ALIGN_STEPS=${ALIGN_STEPS:-250} FACT_STEPS=${FACT_STEPS:-4500}
  RELATION_STEPS=${RELATION_STEPS:-1800} QUESTION_STEPS=${QUESTION_STEPS:-3600}
  ANSWER_STEPS=${ANSWER_STEPS:-2000} BATCH=${BATCH:-32}
fi
TRAIN=$DATA/digits/train

shared() {
  "$PYTHON" -m llava.digits.build --out "$DATA" --seed "$SEED" --parts tokenizer train \
    --train-pictures "$PICTURES"
  "$PYTHON" -m llava.digits.pretrain_tower --out "$WORK/tower" --steps "$TOWER_STEPS" --seed "$SEED"
  "$PYTHON" -m llava.digits.base --tower "$WORK/tower" --tokenizer "$DATA/digits/tokenizer" \
    --out "$WORK/base" --steps "$BASE_STEPS" --seed "$SEED"
}

# stage RUN NAME MODEL DATA VERSION STEPS LR [flags]: one run of the project's training entry point
stage() {
  local run=$1 name=$2 model=$3 file=$4 version=$5 steps=$6 lr=$7; shift 7
  if [ -f "$run/$name/train_summary.json" ]; then echo "stage $run/$name is done"; return; fi
  "$PYTHON" -m llava.train.train \
    --model_name_or_path "$model" --version "$version" \
    --data_path "$TRAIN/$file" --image_folder "$TRAIN/images" \
    --vision_tower "$WORK/tower" --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu \
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio square \
    --attn_implementation eager --bf16 True --use_cpu True \
    --model_max_length 512 --image_cache_mb 2500 --cache_text True --dataloader_num_workers 0 \
    --per_device_train_batch_size "$BATCH" --max_steps "$steps" --learning_rate "$lr" \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
    --warmup_steps 50 --weight_decay 0.01 --adam_beta2 0.95 --max_grad_norm 1.0 \
    --loss_mean tokens --logging_steps 25 --save_steps 500 --save_total_limit 1 \
    --report_to none --seed "$SEED" --output_dir "$run/$name" "$@"
}

# The stages of one model: stages PLAN [plan flags]. With PyramidDrop every stage drops, from the
# first step on: gently until the questions are known, with the final ratios in the last stage.
stages() {
  local run=$WORK/$1; shift
  stage "$run" align "$WORK/base" align.json plain "$ALIGN_STEPS" 2e-3 \
    --pretrain_mm_mlp_adapter "$WORK/base/mm_projector.bin" "$@"
  stage "$run" facts "$run/align" facts.json plain "$FACT_STEPS" 2e-3 "$@"
  stage "$run" relations "$run/facts" relations.json plain "$RELATION_STEPS" 2e-3 "$@"
  stage "$run" questions "$run/relations" questions.json mistral_instruct "$QUESTION_STEPS" 2e-3 "$@"
}

# shipped PLAN NAME [last stages]: the folder of one checkpoint
shipped() {
  local plan=$1 name=$2 run=$WORK/$1; shift 2
  "$PYTHON" -m llava.digits.finish \
    --stages "$run/align" "$run/facts" "$run/relations" "$run/questions" "$@" \
    --tower "$WORK/tower" --base "$WORK/base" --plan "$plan" --out "$OUT/$name"
}

complete() {
  [ -f "$OUT/$1/training.json" ] || return 1
  echo "$OUT/$1 is complete; delete it to train again"
}

plain() {
  complete llava-digits && return
  shared
  stages none --reduction none
  shipped none llava-digits
}

dropped() {
  complete llava-digits-pdrop && return
  shared
  local run=$WORK/pyramiddrop layers=${LAYERS:-[2,4,5]}
  stages pyramiddrop --layer_list "$layers" --image_token_ratio_list "${EARLY_RATIOS:-[0.8,0.64,0.512]}"
  BATCH=$((2 * BATCH)) stage "$run" answers "$run/questions" answers.json mistral_instruct \
    "$ANSWER_STEPS" 8e-4 \
    --layer_list "$layers" --image_token_ratio_list "${RATIOS:-[0.6,0.36,0.216]}"
  shipped pyramiddrop llava-digits-pdrop "$run/answers"
}

case "$PLAN" in
  none) plain ;;
  pyramiddrop) dropped ;;
  both)
    if complete llava-digits && complete llava-digits-pdrop; then
      exit 0
    elif [ "$(nproc)" -lt 2 ]; then
      plain
      dropped
    else
      shared
      echo "training llava-digits beside it: $WORK/none.log"
      plain >"$WORK/none.log" 2>&1 &
      other=$!
      trap 'kill "$other" 2>/dev/null || true' EXIT
      dropped
      wait "$other" || { tail -5 "$WORK/none.log" >&2; exit 1; }
    fi
    ;;
esac
