# What the training scripts share: `source ".../train_lib.sh"`. A script names a recipe's own flags
# and calls `run_train` or `run_stage_2` with SAMPLES BATCH ZERO FLAGS... "$@": samples a step, the most
# of them a GPU takes at once, the DeepSpeed config, flags of `llava train --help`.
#
# Variables a user may set for any of them:
#   MODEL, VISION_TOWER, DATA_PATH, IMAGE_FOLDER, OUTPUT_DIR    where things are
#   PROJECTOR=...      stage 2: the mm_projector.bin to start from (default: stage 1's), or none where
#                      MODEL is a LLaVA checkpoint, which has its own
#   REDUCTION=...      a plan, "none" for the recipe without dropping; or LAYER_LIST=... and
#                      RATIO_LIST=... (PyramidDrop's); without them the script's own
#   GPUS=N             processes on this machine, one a GPU (default: all visible GPUs)
#   LAUNCHER=...       deepspeed (default on GPUs), torchrun (default elsewhere), or srun, which starts
#                      one task a GPU in an allocation (scripts/slurm)
#   NNODES=N           machines, each with GPUS. deepspeed then wants HOSTFILE=...; torchrun is started
#                      on each with NODE_RANK=... MASTER_ADDR=... [MASTER_PORT=...]
#   DEEPSPEED=...      another config, or none (default without a GPU)
#   GLOBAL_BATCH=N     samples a step; whatever the number of GPUs, it stays what it is
#   BATCH=N            samples a GPU takes at once; the rest is accumulated
#   PACKED=0           pad the samples of a batch instead of laying them one behind the other
#   COMPARE=N          measure N steps without the plan first (--compare_steps)
#   ESTIMATE=1         say what it would need on GPUS (default 8) and end; on any machine
#   REPORT_TO=...      tensorboard, wandb (default; only where a key or WANDB_MODE=offline is set), none,
#                      or several with commas between
#   SAVE_STEPS=N       a checkpoint every N steps (default: the recipe's, which is more than it has)
#   WORKERS=N          processes a rank that prepare batches (default 4)
#   PYTHON=...         the interpreter (default python)
#   SMOKE=1            three steps on a tiny model and data that are made on the spot, in SMOKE_DIR
#                      (default checkpoints/smoke/train)
#   DRY_RUN=1          print the command
# Flags behind the script's name go last, so they win. An interrupted run goes on when started again.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
PY=${PY:-${PYTHON:-python}}

# default NAME VALUE: sets a variable that is unset or empty.
default() { [ -n "${!1:-}" ] || printf -v "$1" '%s' "$2"; }

# one_of NAME VALUE...: the variable must hold one of them.
one_of() {
  local name=$1 value
  shift
  for value in "$@"; do [ "${!name}" != "$value" ] || return 0; done
  die "$name=${!name}; accepted: $*"
}

# number NAME: the variable must hold a whole number from 1 on.
number() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "$1=${!1}; accepted: a whole number from 1 on"; }

# What the plan adds to a folder's name: "" for none, -pdrop for PyramidDrop's lists, else its method.
plan_suffix() {
  local plan=${REDUCTION:-pdrop}
  plan=${plan##*/}
  plan=${plan%%[:+.]*}
  [ "$plan" = none ] || printf -- '-%s' "${plan/#pyramiddrop/pdrop}"
}

# stage_2_of_1_5 [ENDING]: what LLaVA-1.5's second stage starts from and where it goes, for SIZE 7b or
# 13b; ENDING is that of the output folder's name.
stage_2_of_1_5() {
  default SIZE 7b
  one_of SIZE 7b 13b
  default MODEL "lmsys/vicuna-$SIZE-v1.5"
  default PROJECTOR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)-pretrain/mm_projector.bin"
  default DATA_PATH ./playground/data/llava_v1_5_mix665k.json
  default IMAGE_FOLDER ./playground/data
  default OUTPUT_DIR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)${1:-}"
}

# Sets LAUNCHER, GPUS, NNODES and WORLD (processes in all) from what was given and what is there.
choose_launcher() {
  local there
  there=$(gpus_here)
  [ -z "${GPUS:-}" ] || number GPUS
  [ "${ESTIMATE:-0}" = 0 ] || there=${GPUS:-$((there > 0 ? there : 8))}
  if [ "$LAUNCHER" = srun ]; then
    [ -n "${SLURM_NTASKS:-}" ] || die "LAUNCHER=srun outside of an allocation; see scripts/slurm"
    [ -z "${GPUS:-}" ] || die "GPUS=$GPUS with LAUNCHER=srun; the allocation says how many tasks"
    there=${SLURM_GPUS_ON_NODE:-$there}
    WORLD=$SLURM_NTASKS
  else
    default NNODES 1
    default GPUS "$((there > 0 ? there : 1))"
    number NNODES
    ((there == 0 || GPUS <= there)) || die "GPUS=$GPUS, but $there are visible here"
    WORLD=$((GPUS * NNODES))
  fi
  if ((there == 0)); then
    default DEEPSPEED none
    default LAUNCHER torchrun
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}  # or it warns that it found nothing else
  fi
  default DEEPSPEED "$1"
  [ "$DEEPSPEED" != none ] || default LAUNCHER torchrun
  # deepspeed's launcher knows GPUs by number alone, not by an id as MIG slices have.
  [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9,]*$ ]] || default LAUNCHER torchrun
  [ "$NNODES" = 1 ] || [ -n "${HOSTFILE:-}" ] || default LAUNCHER torchrun
  default LAUNCHER deepspeed
  one_of LAUNCHER deepspeed torchrun srun
  if [ "$LAUNCHER" = deepspeed ] || [ "$DEEPSPEED" != none ]; then
    [ "$DRY_RUN" = 1 ] || [ "${ESTIMATE:-0}" = 1 ] ||
      "$PY" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("deepspeed"))' ||
      die "deepspeed is not installed: pip install -e '.[deepspeed]', or set DEEPSPEED=none"
  fi
}

# split_batch SAMPLES MOST: BATCH x ACCUMULATE x WORLD = SAMPLES, BATCH at most MOST unless it is given.
split_batch() {
  local samples=$1 most=$2 share
  share=$((samples / WORLD))
  if ((samples % WORLD)); then
    die "GLOBAL_BATCH=$samples does not divide over $WORLD processes; what would: GLOBAL_BATCH=$(
      ((share == 0)) || printf '%d or ' $((share * WORLD))
    )$(((share + 1) * WORLD)), or$(divisors "$samples" "$WORLD") of them"
  fi
  if [ -n "${BATCH:-}" ]; then
    number BATCH
    ((share % BATCH == 0)) || die "BATCH=$BATCH does not divide the $share samples of a step that each" \
      "of $WORLD processes takes (GLOBAL_BATCH=$samples); what would:$(divisors "$share" "$share")"
  else
    BATCH=$((most < share ? most : share))
    while ((share % BATCH)); do BATCH=$((BATCH - 1)); done
  fi
  ACCUMULATE=$((share / BATCH))
}

# divisors N MOST: the divisors of N up to MOST, each with a space in front.
divisors() {
  local n
  for ((n = 1; n <= $2; n++)); do (($1 % n)) || printf ' %d' "$n"; done
}

# Sets START: the words in front of the training flags.
starter() {
  local module=llava.train.train
  if [ "${ESTIMATE:-0}" = 1 ]; then
    START=("$PY" -m "$module" --estimate --world_size "$WORLD")
    return
  fi
  case $LAUNCHER in
    srun)
      export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
      export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
      export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}  # not handed on
      # A rank that fails takes the others with it, but not before they are done with saving.
      export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-120}
      START=(srun bash scripts/slurm/task.sh "$PY" -m "$module")
      ;;
    deepspeed)
      START=("$PY" -m deepspeed.launcher.runner)
      if [ -n "${HOSTFILE:-}" ]; then
        START+=(--hostfile "$HOSTFILE" --num_nodes "$NNODES" --num_gpus "$GPUS")
      elif ((NNODES > 1)); then
        die "LAUNCHER=deepspeed on $NNODES machines needs HOSTFILE=...; or take LAUNCHER=torchrun"
      elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then  # --num_gpus would forget which
        START+=(--include "localhost:$(cut -d, -f "1-$GPUS" <<<"$CUDA_VISIBLE_DEVICES")")
      else
        START+=(--num_gpus "$GPUS")
      fi
      START+=(${MASTER_PORT:+--master_port "$MASTER_PORT"} --module "$module")
      ;;
    torchrun)
      START=("$PY" -m torch.distributed.run --nproc_per_node "$GPUS")
      if ((NNODES > 1)); then
        [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
          die "NNODES=$NNODES: start this on every machine with NODE_RANK=0, 1, ... and MASTER_ADDR=..." \
            "(the first one's), or give HOSTFILE=... to deepspeed's launcher"
        START+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
          --master_port "${MASTER_PORT:-29500}" -m "$module")
      elif ((GPUS > 1)) || [ "$DEEPSPEED" != none ]; then
        START+=(--standalone -m "$module")
      else
        START=("$PY" -m "$module")
      fi
      ;;
  esac
}

# run_train SAMPLES BATCH ZERO FLAGS...
run_train() {
  local samples=$1 most=$2 zero=$3 flags=()
  shift 3
  if [ "${SMOKE:-0}" = 1 ]; then
    most=2
    flags+=(--max_steps 3 --overwrite_output_dir True)
    [ "${ESTIMATE:-0}" = 0 ] || default GPUS 1
  fi
  [ "$DRY_RUN" = 1 ] || command -v "$PY" >/dev/null ||
    die "no Python at $PY; name one with PYTHON=/path/to/python"
  default PACKED 1
  one_of PACKED 0 1
  [ -z "${REDUCTION:-}" ] || [ -z "${LAYER_LIST:-}${RATIO_LIST:-}" ] ||
    die "REDUCTION=$REDUCTION with LAYER_LIST or RATIO_LIST; give one way of saying the plan"
  default LAUNCHER ""
  default NNODES ""
  choose_launcher "scripts/$zero.json"
  [ "${SMOKE:-0}" = 0 ] || samples=$((WORLD * (WORLD < 4 ? 4 / WORLD : 1)))
  default GLOBAL_BATCH "$samples"
  number GLOBAL_BATCH
  if [ "${SMOKE:-0}" = 1 ] && [ ! -f "$SMOKE_DIR/made.json" ]; then
    run "$PY" scripts/smoke_data.py "$SMOKE_DIR"
  fi
  split_batch "$GLOBAL_BATCH" "$most"
  starter
  [ "$DEEPSPEED" = none ] || flags+=(--deepspeed "$DEEPSPEED")
  if [ -n "${REDUCTION:-}" ]; then
    flags+=(--reduction "$REDUCTION")
  else
    flags+=(--layer_list "${LAYER_LIST:-[8,16,24]}")
    flags+=(--image_token_ratio_list "${RATIO_LIST:-[0.5,0.25,0.125]}")
  fi
  [ "${PACKED:-1}" = 0 ] || flags+=(--packed True)
  [ -n "${COMPARE:-}" ] && flags+=(--compare_steps "$COMPARE")
  run "${START[@]}" "${flags[@]}" \
    --model_name_or_path "$MODEL" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --data_path "$DATA_PATH" \
    --image_folder "$IMAGE_FOLDER" \
    --output_dir "$OUTPUT_DIR" \
    --bf16 True \
    --tf32 True \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$BATCH" \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATE" \
    --eval_strategy no \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-50000}" \
    --save_total_limit 1 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --gradient_checkpointing True \
    --dataloader_num_workers "${WORKERS:-4}" \
    --lazy_preprocess True \
    --report_to ${REPORT_TO:-wandb} \
    "$@"
}

# run_stage_2 SAMPLES BATCH ZERO FLAGS...: `run_train` from the projector of stage 1.
run_stage_2() {
  local first=("$1" "$2" "$3")
  shift 3
  [ "$PROJECTOR" = none ] || first+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
  run_train "${first[@]}" "$@"
}

VISION_TOWER=${VISION_TOWER:-}
if [ "${SMOKE:-0}" = 1 ]; then
  default SMOKE_DIR "$ROOT/checkpoints/smoke/train"
  SMOKE_NAME=${0##*scripts/}
  default MODEL "$SMOKE_DIR/model"
  default VISION_TOWER "$SMOKE_DIR/tower"
  default PROJECTOR "$SMOKE_DIR/mm_projector.bin"
  default HEADS "$SMOKE_DIR/heads.npy"
  case $SMOKE_NAME in
    *pretrain*) default DATA_PATH "$SMOKE_DIR/captions.json" ;;
    *) default DATA_PATH "$SMOKE_DIR/instructions.json" ;;
  esac
  default IMAGE_FOLDER "$SMOKE_DIR/images"
  default OUTPUT_DIR "$SMOKE_DIR/out/${SMOKE_NAME%.sh}"
  default WORKERS 0
fi
default VISION_TOWER openai/clip-vit-large-patch14-336
