# Sourced by the training jobs of this folder, from the repository's root.
#
#   train_job SCRIPT FLAGS...   runs a training script in the allocation, one srun task a GPU, and
#                               puts the job back into the queue when a signal has stopped it
source scripts/train_lib.sh

train_job() {
  local code=0
  export LAUNCHER=srun SAVE_STEPS=${SAVE_STEPS:-500}
  export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}  # srun takes no other
  # A rank that fails takes the others with it, but not before they are done with saving.
  export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-120}
  trap : USR1 TERM  # the ranks hear the signal; this shell waits for what they say
  bash "$@" || code=$?
  if [ "$code" = 75 ]; then
    say "stopped by a signal, checkpoint saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "not queued again; the same sbatch line goes on"
  fi
  exit "$code"
}
