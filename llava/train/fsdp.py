"""FSDP2: the flags, ranks without an accelerator, and the files to resume from.

Special here: accelerate wraps the model (one unit a decoder layer, one for the embeddings, one for
norm and head, the root with tower and projector), but for accelerators only; `shard_on_cpu` lets it
do the same on gloo ranks, so that the path is tested without a GPU. A layer's weights are touched
within the layer's own call alone (`llava.model.staged_decoder`), which is what sharding needs.
Resuming reads ``fsdp_state/``: trained weights and optimizer, every rank's share in its own file,
for any number of ranks; the model is saved beside it in the usual layout.
``torchrun --nproc_per_node 8 -m llava.train.train --fsdp full_shard ...``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.train.flag_checks import read_settings

STATE_FOLDER = "fsdp_state"
WORDS: dict[str, dict[str, Any]] = {
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},
    "true": {},
}
"""Words of ``--fsdp`` -> what they mean in ``--fsdp_config``."""


def fsdp_settings(asked: Any, config: Any) -> dict[str, Any] | None:
    """``--fsdp`` and ``--fsdp_config`` as one dict of settings, None when FSDP is not asked for.

    asked: words of `WORDS` in one string or a list, or a bool. config: a dict, its JSON, or the
    path of a JSON file; wins over the words. ValueError for an unknown word, for JSON that is none,
    for FSDP1.
    """
    words = asked.split() if isinstance(asked, str) else asked
    words = [str(word).lower() for word in (words if isinstance(words, list) else [bool(words)])]
    if words in ([], ["false"]):
        return None
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"--fsdp {' '.join(unknown)}: unknown; accepted: {', '.join(WORDS)}")
    config = read_settings("fsdp_config", config)
    settings: dict[str, Any] = {"version": 2}
    for word in words:
        settings.update(WORDS[word])
    settings.update({key.removeprefix("fsdp_"): value for key, value in (config or {}).items()})
    if str(settings["version"]) != "2" or settings.get("xla"):
        raise ValueError("--fsdp_config asks for FSDP1 or XLA; accepted: version 2")
    return settings


def shard_on_cpu(accelerator: Any, plugin_arguments: dict[str, Any]) -> None:
    """Let an `Accelerator` on gloo ranks shard as it does on GPUs, over a mesh of these ranks."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig

    state = accelerator.state
    plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    mesh = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    state.parallelism_config, state.device_mesh = mesh, mesh.get_device_mesh("cpu")


def save_state(model: Any, optimizer: Any, folder: str | Path) -> None:
    """Write trained weights and optimizer of a sharded model; every rank calls it."""
    import torch.distributed.checkpoint as checkpoint

    writer = checkpoint.FileSystemWriter(str(Path(folder) / STATE_FOLDER))
    checkpoint.save(_state(model, optimizer), storage_writer=writer)


def load_state(model: Any, optimizer: Any, folder: str | Path) -> None:
    """Read back what `save_state` wrote, from any number of ranks; every rank calls it."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = _state(model, optimizer)
    reader = checkpoint.FileSystemReader(str(Path(folder) / STATE_FOLDER))
    checkpoint.load(state, storage_reader=reader)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}
