# Settings and stages that scripts/digits/train.sh and compare.sh share; to be sourced, not run.
# DATA: where the digits lie or are built; WORK: tower, base and stages; see the two scripts.

SMOKE=${SMOKE:-0}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
export OMP_NUM_THREADS=${THREADS:-1}

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
LAYERS=${LAYERS:-[2,4,5]} RATIOS=${RATIOS:-[0.6,0.36,0.216]}
EARLY_RATIOS=${EARLY_RATIOS:-[0.8,0.64,0.512]}

# What every model here starts from: pictures and files, tokenizer, tower, base.
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

# Captions and statements, before any question is asked: captions PLAN [plan flags]
captions() {
  local run=$WORK/$1; shift
  stage "$run" align "$WORK/base" align.json plain "$ALIGN_STEPS" 2e-3 \
    --pretrain_mm_mlp_adapter "$WORK/base/mm_projector.bin" "$@"
  stage "$run" facts "$run/align" facts.json plain "$FACT_STEPS" 2e-3 "$@"
  stage "$run" relations "$run/facts" relations.json plain "$RELATION_STEPS" 2e-3 "$@"
}

# Questions in words, six a picture: questions PLAN [plan flags]
questions() {
  local run=$WORK/$1; shift
  stage "$run" questions "$run/relations" questions.json mistral_instruct "$QUESTION_STEPS" 2e-3 "$@"
}
