#!/usr/bin/env bash
# One task of srun as one rank of torch.distributed: srun bash scripts/slurm/task.sh COMMAND...
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
trap '' USR1  # until training listens, the signal must not end it
exec "$@"
