# Sourced by the training jobs of this folder, from the repository's root.
#
#   train_job SCRIPT FLAGS...   runs a training script in the allocation, one srun task a GPU, and
#                               puts the job back into the queue when a signal has stopped it
source scripts/lib.sh

train_job() {
  local code=0
  export LAUNCHER=srun SAVE_STEPS=${SAVE_STEPS:-500}
  trap : USR1 TERM  # the ranks hear the signal; this shell waits for what they say
  bash "$@" || code=$?
  # A job that was cancelled stops like one whose time is up, and is not to come back.
  if [ "$code" = 75 ] && [ -n "$(squeue -h -j "$SLURM_JOB_ID" -t RUNNING -o %i)" ]; then
    say "stopped by a signal, checkpoint saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "not queued again; the same sbatch line goes on"
  fi
  exit "$code"
}
