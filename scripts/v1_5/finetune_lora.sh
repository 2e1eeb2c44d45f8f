#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with LoRA as LLaVA trains it; with REDUCTION=... any plan. Variables:
# scripts/train_lib.sh.
#
#   bash scripts/v1_5/finetune_lora.sh [more flags]
set -euo pipefail
export REDUCTION=${REDUCTION:-none}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pdrop_train/finetune_lora.sh" "$@"
