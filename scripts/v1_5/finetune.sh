#!/usr/bin/env bash
# LLaVA-1.5 stage 2 as LLaVA trains it; with REDUCTION=... any plan. Variables: scripts/train_lib.sh.
#
#   bash scripts/v1_5/finetune.sh [more flags]
set -euo pipefail
export REDUCTION=${REDUCTION:-none}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pdrop_train/finetune.sh" "$@"
