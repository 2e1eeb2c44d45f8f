"""Flags of older trainers that are no fields here: renamed, dropped at their default, or refused.

Special here: nothing is passed over in silence. A flag at the value that its own trainer gives it
by default asks for nothing and is dropped; with any other value it ends in an error that says what
to use instead. Sources: LLaVA-NeXT's train.py and the arguments of transformers 4.37, which
LLaVA-1.5's scripts were written for. ``python -m llava.train.train --help``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llava.utils import get_logger

logger = get_logger(__name__)

RENAMED: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "group_by_varlen": "group_by_length",
    "group_by_modality_length_auto": "group_by_modality_length",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
"""Old name -> the name of today, with the same values."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A flag whose feature is not here: `accepted` are the values that do not ask for it."""

    accepted: tuple[str, ...]
    instead: str


_OFF = ("False",)
_NONE = ("None", "")
_PROJECTOR = "a projector keeps every visual token here; --reduction shortens the sequence"
_VIDEO = "video is not trained on here; give frames as a list of pictures"
_CONFIG = "put rope_parameters into the base's config.json"
_PARTS = "say what is trained with --mm_tunable_parts"
_FSDP = "give --fsdp_config"
_TILES = "anyres with --image_grid_pinpoints is the way of tiling here"
_ACCELERATE = "give --accelerator_config"

REFUSED: dict[str, Refused] = {
    # LLaVA-NeXT
    "model_class_name": Refused(_NONE, "the class follows model_type in the base's config.json"),
    "tune_mm_vision_resampler": Refused(_OFF, _PROJECTOR),
    "unfreeze_language_model": Refused(_OFF, _PARTS),
    "vision_tower_pretrained": Refused(_NONE, "give the tower's folder as --vision_tower"),
    "mm_resampler_type": Refused(_NONE, _PROJECTOR),
    "mm_spatial_pool_stride": Refused(_NONE, _PROJECTOR),
    "mm_spatial_pool_mode": Refused(("bilinear",), _PROJECTOR),
    "mm_spatial_pool_out_channels": Refused(_NONE, _PROJECTOR),
    "mm_perceiver_depth": Refused(("3",), _PROJECTOR),
    "mm_perceiver_latents": Refused(("32",), _PROJECTOR),
    "mm_perceiver_ff_mult": Refused(("4",), _PROJECTOR),
    "mm_perceiver_pretrained": Refused(_NONE, _PROJECTOR),
    "mm_qformer_depth": Refused(("3",), _PROJECTOR),
    "mm_qformer_latents": Refused(("32",), _PROJECTOR),
    "mm_qformer_pretrained": Refused(_NONE, _PROJECTOR),
    "mm_mask_drop_mode": Refused(("fixed",), "random dropping is a plan: --reduction random:..."),
    "mm_mask_drop_skip_percentage": Refused(("0.0", "0"), "--reduction random:..."),
    "mm_mask_drop_ratio": Refused(("0.25",), "--reduction random:..."),
    "mm_mask_drop_ratio_upper": Refused(_NONE, "--reduction random:..."),
    "mm_mask_drop_ratio_lower": Refused(_NONE, "--reduction random:..."),
    "rope_scaling_factor": Refused(_NONE, _CONFIG),
    "rope_scaling_type": Refused(_NONE, _CONFIG),
    "s2": Refused(_OFF, _TILES),
    "s2_scales": Refused(("336,672,1008",), _TILES),
    "use_pos_skipping": Refused(_OFF, _CONFIG),
    "pos_skipping_range": Refused(("4096",), _CONFIG),
    "mm_newline_position": Refused(("grid",), "a newline ends each row of the grid of tiles"),
    "image_crop_resolution": Refused(_NONE, _TILES),
    "image_split_resolution": Refused(_NONE, _TILES),
    "early_mix_text": Refused(_OFF, "--group_by_modality_length True mixes batches, not samples"),
    "video_folder": Refused(_NONE, _VIDEO),
    "video_fps": Refused(("1",), _VIDEO),
    "frames_upbound": Refused(("0",), _VIDEO),
    "force_sample": Refused(_OFF, _VIDEO),
    "add_time_instruction": Refused(_OFF, _VIDEO),
    "verbose_logging": Refused(_OFF, "set LLAVA_LOG=debug"),
    "trainer_mode": Refused(("regular",), "there is one trainer"),
    # transformers 4.37
    "adafactor": Refused(_OFF, "give --optim adafactor"),
    "dispatch_batches": Refused(_NONE, _ACCELERATE),
    "split_batches": Refused(("False", "None"), _ACCELERATE),
    "fp16_backend": Refused(("auto",), "there is torch's own mixed precision: --fp16 or --bf16"),
    "fp16_opt_level": Refused(("O1",), "there is torch's own mixed precision: --fp16 or --bf16"),
    "half_precision_backend": Refused(
        ("auto", "cpu_amp", "cuda_amp"), "there is torch's own mixed precision: --fp16 or --bf16"
    ),
    "fsdp_min_num_params": Refused(("0",), _FSDP),
    "fsdp_transformer_layer_cls_to_wrap": Refused(_NONE, _FSDP),
    "include_inputs_for_metrics": Refused(_OFF, "validation computes the loss only"),
    "include_tokens_per_second": Refused(_OFF, "tokens a second are always logged"),
    "jit_mode_eval": Refused(_OFF, "give --torch_compile True"),
    "mp_parameters": Refused(_NONE, "SageMaker's model parallelism is not supported"),
    "past_index": Refused(("-1",), "no supported model returns such a state"),
    "push_to_hub_organization": Refused(_NONE, "give --hub_model_id ORGANIZATION/NAME"),
    "ray_scope": Refused(("last",), "there is no hyper-parameter search"),
    "torchdynamo": Refused(_NONE, "give --torch_compile True"),
    "tpu_metrics_debug": Refused(_OFF, "give --debug tpu_metrics_debug"),
    "tpu_num_cores": Refused(_NONE, "TPUs are not supported"),
    "use_ipex": Refused(_OFF, "torch's own CPU kernels are used"),
    "use_legacy_prediction_loop": Refused(_OFF, "there is one evaluation loop"),
    "use_mps_device": Refused(_OFF, "an Apple GPU is used when there is one"),
}


def translate(argv: Sequence[str]) -> list[str]:
    """A command line without the flags of this module.

    Raises ValueError for a refused flag that asks for something.
    """
    out: list[str] = []
    place = 0
    while place < len(argv):
        stop = place + 1
        while stop < len(argv) and not argv[stop].startswith("--"):
            stop += 1
        flag, given, value = argv[place].partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in RENAMED:
            logger.info("--%s is --%s here", name, RENAMED[name])
            out.append(f"--{RENAMED[name]}{given}{value}")
            out += argv[place + 1 : stop]
        elif name in REFUSED:
            values = [value] if given else argv[place + 1 : stop]
            _check(name, " ".join(values) if values else "True")
        else:
            out += argv[place:stop]
        place = stop
    return out


def _check(name: str, value: str) -> None:
    refused = REFUSED[name]
    if value.strip().lower() not in [text.lower() for text in refused.accepted]:
        raise ValueError(
            f"--{name} {value} is not offered here: {refused.instead} (accepted: "
            f"{' or '.join(repr(text) for text in refused.accepted)}, which ask for nothing)"
        )


def epilog() -> str:
    """What --help says about these flags."""
    names = ", ".join(f"--{old} (--{new})" for old, new in RENAMED.items())
    refused = "; ".join(f"--{name}: {flag.instead}" for name, flag in REFUSED.items())
    return (
        f"Old names of flags: {names}. Flags of LLaVA-NeXT and of transformers 4.37 that are "
        f"accepted at their default and refused with any other value: {refused}."
    ).replace("%", "%%")
