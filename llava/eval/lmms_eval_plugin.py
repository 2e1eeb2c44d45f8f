"""What lmms-eval 0.7 finds through its entry point group `lmms_eval.models`: a model named `llava`.

    python -m lmms_eval --model llava --tasks pope --batch_size 32 \\
        --model_args "pretrained=liuhaotian/llava-v1.5-7b,reduction=fastv:k=3;r=0.5"

Special here: it takes the place of the harness's own `llava`, so that command lines and the prompts
that tasks keep for that name stay what they are. Nothing but the table is imported until the model
is asked for (`llava.eval.lmms_eval_models`).
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The harness's `ModelManifest` of this package: a chat class, and a simple one for
    `--force_simple` and tasks that ask for likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = "llava.eval.lmms_eval_models"
    return ModelManifest("llava", f"{classes}.Llava", f"{classes}.LlavaChat")
