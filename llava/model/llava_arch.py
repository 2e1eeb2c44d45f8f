"""LLaVA's shell around a staged decoder: pictures in, losses and tokens out.

Nothing about a request is stored on the model. The plan comes with the call (``reduction=``), else
from the checkpoint's config; a batch travels as one `TokenSequence`.

    out = model.generate(ids, images=pixels, reduction="pyramiddrop:layers=[8],ratios=[0.5]")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from llava.constants import IGNORE_INDEX
from llava.model.hf_inputs import fold_image_ids, image_token_id, unpack_pixels
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_prep import (
    Splice,
    Splicer,
    embed_splice,
    sample_seeds,
    tile_counts,
    with_soft_tokens,
)
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.shared_prefix import Prefix, encode_prefix
from llava.model.staged_cache import StagedCache
from llava.model.staged_decoder import CutTrace, Record, padding_side, text_sequence
from llava.reduction.plan import StageFacts, resolve_plan
from llava.sequence import Kind, TokenSequence


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """transformers' output and, when `return_trace` is set: sequence, what is left behind the last
    layer; trace, one `CutTrace` a cut; stages, the layers and lengths that ran."""

    sequence: TokenSequence | None = None
    trace: tuple[CutTrace, ...] | None = None
    stages: tuple[StageFacts, ...] | None = None


_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")


class LlavaMetaModel:
    """Tower, projector and newline beside a decoder. Mixin in front of `StagedModelMixin`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None) is not None:
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
                self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `StagedModelMixin.forward`.

        transformers hooks every layer below a model when outputs of layers are first asked for, a
        tower that has been called by itself a second time; from then on its hidden states would
        come double, and `mm_vision_select_layer` name others. So the decoder is hooked alone.
        """
        asked = (kwargs.get(name, getattr(self.config, name, False)) for name in _LAYER_OUTPUTS)
        if any(asked) and "vision_tower" in self._modules:
            tower = self._modules["vision_tower"]
            self._modules["vision_tower"] = None
            try:
                maybe_install_capturing_hooks(self)
            finally:
                self._modules["vision_tower"] = tower
        return super().forward(*args, **kwargs)

    def get_vision_tower(self) -> Any:
        """The tower, or None for a model without one."""
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def newline(self) -> Tensor | None:
        """The newline embedding [D], or None. It is a parameter of the decoder itself, which is not
        being called while pictures are spliced: offloaded, it is fetched through the hook."""
        newline = getattr(self, "image_newline", None)
        if newline is None or not (newline.is_meta and hasattr(self, "_hf_hook")):
            return newline
        from accelerate.utils import align_module_device

        with align_module_device(self):
            return self.image_newline.detach().clone()

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Give the model a tower and a projector, as LLaVA's training does.

        model_args: vision_tower, mm_vision_select_layer, mm_vision_select_feature,
        mm_projector_type, mm_patch_merge_type, pretrain_mm_mlp_adapter (a mm_projector.bin). fsdp
        is accepted for LLaVA's callers and not read. ValueError for an adapter that does not fit.
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_projector_type = getattr(model_args, "mm_projector_type", None) or "linear"
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", None) or "flat"
        tower = self.get_vision_tower()
        if tower is None or tower.vision_tower_name != model_args.vision_tower:
            config.mm_vision_config = None
            tower = build_vision_tower(config, delay_load=True)
            self.vision_tower = tower
        if not tower.is_loaded:
            tower.load_model()
        tower.select_layer = config.mm_vision_select_layer
        tower.select_feature = config.mm_vision_select_feature
        config.mm_vision_config = tower.config.to_diff_dict()
        config.mm_vision_config["model_type"] = tower.config.model_type
        config.use_mm_proj = True
        config.mm_hidden_size = tower.hidden_size
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type and getattr(self, "image_newline", None) is None:
            scale = config.hidden_size**-0.5
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * scale)
        self.mm_projector.requires_grad_(True)
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if adapter is not None:
            self._load_adapter(adapter)

    def _load_adapter(self, path: str) -> None:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        marker = "mm_projector."
        projector = {k.split(marker, 1)[1]: v for k, v in weights.items() if marker in k}
        wanted = set(self.mm_projector.state_dict())
        if set(projector) != wanted:
            raise ValueError(
                f"adapter {path} holds projector keys {sorted(projector)}; needed: {sorted(wanted)}"
            )
        newline = [v for k, v in weights.items() if k.endswith("image_newline")]
        own = getattr(self, "image_newline", None)
        with _writable([*self.mm_projector.parameters(), *([] if own is None else [own])]):
            self.mm_projector.load_state_dict(projector)
            if newline and own is not None:
                own.data.copy_(newline[0])


@contextlib.contextmanager
def _writable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block parameters that ZeRO-3 has split are whole; what rank 0 writes is kept."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(split, modifier_rank=0):
        yield


class LlavaMetaForCausalLM:
    """Mixin in front of a transformers `...ForCausalLM`. A subclass names `decoder_class`."""

    decoder_class: type[nn.Module]
    # Assisted decoding with embeddings returns wrong tokens silently; the rest is custom code.
    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]
    # True: `generate` returns prompt and new tokens for every call, as transformers does.
    prompt_in_output = False
    # Soft tokens of DualSpeed training, in the checkpoints that a run resumes from.
    _keys_to_ignore_on_load_unexpected = [r"\bmode_isolator\."]
    # The whole-graph compile of transformers needs a static cache, which has no stages.
    _can_compile_fullgraph = False

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> Any:
        return self.model

    def get_vision_tower(self) -> Any:
        return self.get_model().get_vision_tower()

    def encode_images(self, tiles: Tensor) -> Tensor:
        """Tiles [T, 3, H, W] -> projected features [T, P, D]."""
        features = self.get_vision_tower()(tiles)
        weight = next(self.get_model().mm_projector.parameters(), features)
        return self.get_model().mm_projector(features.to(weight.dtype))

    @property
    def context_length(self) -> int:
        """Tokens, visual ones included, that a prompt may have."""
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        return limit or self.config.max_position_embeddings

    # From LLaVA's inputs to a sequence

    def build_sequence(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        *,
        kind: Kind | None = None,
        splice: Splice | None = None,
        pixel_values: Any = None,
        texts: Mapping[str, Tensor] | None = None,
        soft_tokens: bool = False,
    ) -> TokenSequence:
        """Embed a batch with its pictures.

        input_ids [B, L] with -200 at each picture; attention_mask [B, L] (None: all real), padded
        on either side; labels [B, L]. images: [n, 3, H, W], [n, tiles, 3, H, W], or a list of
        [3, H, W] or [tiles, 3, H, W]; image_sizes: (width, height) of each, for anyres. kind:
        layout of the result (default: the side of the mask's padding; "packed" for training without
        padding). texts: by name, ids [B, T] (-1: filling) of texts that a method compares with
        (`llava.prompting.side_texts`). Ids, mask, labels and texts are read once on the host,
        unless `splice`, which `self.splicer` made from the same batch, says all that already.
        soft_tokens: put those of the decoder's `mode_isolator` in front of each picture
        (`llava.train.dual_speed`).
        Raises ValueError for pictures that do not match the marks and for a sample that does not
        fit the context.
        pixel_values instead of images: what a llava-hf processor returns (`llava.model.hf_inputs`);
        image_sizes are then (height, width) and a picture is as many image ids as it has tokens.
        """
        if pixel_values is None:
            return self._splice_and_embed(
                input_ids, attention_mask, labels, images, image_sizes, kind, splice, texts=texts,
                soft_tokens=soft_tokens,
            )[0]  # fmt: skip
        if images is not None:
            raise ValueError("images and pixel_values exclude each other; give one")
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError("pixel_values were given to a model without a vision tower")
        images, sizes = unpack_pixels(
            pixel_values, image_sizes, self.config, tower.config.image_size
        )
        return self._splice_and_embed(
            input_ids, attention_mask, labels, images, sizes, kind, expanded=True, texts=texts
        )[0]

    def _splice_and_embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any,
        kind: Kind | None,
        plan: Splice | None = None,
        expanded: bool = False,
        texts: Mapping[str, Tensor] | None = None,
        soft_tokens: bool = False,
    ) -> tuple[TokenSequence, Splice]:
        if plan is None:
            plan = self._splice(
                input_ids, attention_mask, labels, images, image_sizes, kind, expanded, texts
            )
        if expanded:  # the vocabulary need not have the image id
            input_ids = input_ids.masked_fill(input_ids == image_token_id(self.config), 0)
        text = self.get_model().embed_tokens(input_ids.clamp_min(0))
        tiles = self._tiles(images, input_ids.device)
        patches = None if tiles is None else self.encode_images(tiles)
        newline = self.get_model().newline()
        isolator = getattr(self.get_model(), "mode_isolator", None)
        if soft_tokens:
            if isolator is None:
                raise ValueError("soft_tokens=True on a model without a mode_isolator")
            plan = with_soft_tokens(plan, isolator.count)
        soft = None if isolator is None else isolator()
        sequence = embed_splice(plan, text, patches, newline, soft)
        sequence.inputs["seed"] = sample_seeds(plan, tiles, input_ids.device)
        return sequence, plan

    def build_suffixes(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> TokenSequence:
        """Embed the texts of questions that continue a prefix: ids [B, L] without pictures, padded
        on the right as `attention_mask` [B, L] says. The mask is read once on the host."""
        return text_sequence(self.get_model().embed_tokens(input_ids), attention_mask)

    @torch.no_grad()
    def encode_prefix(
        self,
        sequence: TokenSequence,
        reduction: Any = None,
        *,
        questions: Sequence[int] | None = None,
        room: int | None = None,
    ) -> Prefix:
        """Run the common beginning of several prompts once (`llava.model.shared_prefix`).

        sequence: from `build_sequence`, one row a picture, without the questions' own tokens.
        reduction: as in `forward`. questions: how many questions follow each row; not needed for
        one row. room: tokens a question may have (default: what the context leaves); with sliding
        windows less room may mean more shared layers. ValueError for numbers that do not fit.
        """
        plan = resolve_plan(reduction, self.config)[0]
        most = self.context_length - sequence.layout.width
        room = most if room is None else min(room, most)
        return encode_prefix(self.get_model(), sequence, plan, questions=questions, room=room)

    def _splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any,
        kind: Kind | None,
        expanded: bool = False,
        texts: Mapping[str, Tensor] | None = None,
    ) -> Splice:
        """The host's part of a batch, from ids, mask, labels and texts read back once. expanded:
        the ids have one image id for each visual token instead of one mark."""
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        mask = mask.bool()
        if kind is None:
            kind = padding_side(mask)
            if attention_mask is not None and kind == "left" and bool(mask.all()):
                kind = "right" if labels is not None else "left"
        splicer = self.splicer
        pictures = splicer.pictures(tile_counts(images), image_sizes)
        marked, real, image_id = ids.numpy(), mask.numpy(), image_token_id(self.config)
        if not expanded and image_id is not None and (marked[real] == image_id).any():
            raise ValueError(f"input_ids hold the image id {image_id} but no pixel_values came")
        if expanded:
            counts = [len(picture) for picture in pictures]
            marked, real = fold_image_ids(marked, real, counts, image_id)
        return splicer(
            marked,
            real,
            None if labels is None else labels.cpu().numpy(),
            pictures,
            kind,
            {name: rows.cpu().numpy() for name, rows in (texts or {}).items()},
        )

    @property
    def splicer(self) -> Splicer:
        """What a data worker needs to plan batches for this model (`forward(splice=...)`)."""
        tower = self.get_vision_tower()
        geometry = (0, 0, 0)
        if tower is not None:
            size = tower.config.image_size
            geometry = (tower.tokens_per_tile, tower.num_patches_per_side, size)
        return Splicer(self.config, *geometry, self.context_length)

    def _tiles(self, images: Any, device: Any) -> Tensor | None:
        """All tiles of the batch [T, 3, H, W].

        A training batch without pictures gets one black dummy that no sample uses, so that tower
        and projector run on every rank at every step.
        """
        tower = self.get_vision_tower()
        if images is None or len(images) == 0:
            if tower is None or not self.training:
                return None
            size = tower.config.image_size
            return torch.zeros(1, 3, size, size, dtype=tower.dtype, device=device)
        if tower is None:
            raise ValueError("images were given to a model without a vision tower")
        if isinstance(images, Tensor) and images.dim() == 4:
            return images.to(device)
        stacks = [image[None] if image.dim() == 3 else image for image in images]
        return torch.cat([stack.to(device) for stack in stacks])

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        """LLaVA's own entry: (input_ids, position_ids, attention_mask, past_key_values, embeddings
        [B, L', D], labels [B, L']). What was given as None comes back as None; without tower or
        pictures, and in decoding, the inputs come back with embeddings None. The padding side is
        config.tokenizer_padding_side (default right). forward and generate do not go through here:
        the tuple has no place for groups, cells and scoring rows.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        kind = getattr(self.config, "tokenizer_padding_side", None) or "right"
        sequence, plan = self._splice_and_embed(
            input_ids, attention_mask, labels, images, image_sizes, kind
        )
        valid = sequence.origin >= 0
        device = input_ids.device
        return (
            None,
            None if position_ids is None else sequence.position,
            None if attention_mask is None else valid.to(attention_mask.dtype),
            past_key_values,
            sequence.hidden,
            None if labels is None else torch.from_numpy(plan.labels).to(device, labels.dtype),
        )

    # PyramidDrop's name; the reduction's own facts travel in the sequence, not on the model.
    prepare_inputs_labels_for_multimodal_pdrop = prepare_inputs_labels_for_multimodal

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Any = None,
        image_sizes: Any = None,
        sequence: TokenSequence | None = None,
        splice: Splice | None = None,
        packed: bool = False,
        reduction: Any = None,
        logits_to_keep: int | Literal["targets"] = 0,
        loss_mean: Literal["batch", "tokens"] = "batch",
        num_items_in_batch: Tensor | int | None = None,
        return_trace: bool = False,
        record: Record | None = None,
        pixel_values: Any = None,
        texts: Mapping[str, Tensor] | None = None,
        soft_tokens: bool = False,
        **kwargs: Any,
    ) -> LlavaOutput:
        """One pass over a batch, or over further text tokens when `past_key_values` is filled.

        Inputs: as `build_sequence`, or a ready `sequence`, or text embeddings `inputs_embeds`.
        packed: lay the samples one behind the other, without padding (training; no cache). splice,
        soft_tokens: as in `build_sequence`; splice says the layout too.
        reduction: a plan, its text or dict, "none"; None takes the checkpoint's plan.
        logits_to_keep: 0 = all rows that are left [B, W', V], n = the last n, "targets" = the rows
        with a supervised next token [count, V], what training needs.
        loss_mean: "batch" = mean over the supervised tokens of this batch (LLaVA: a mean of means
        over micro-batches and ranks); "tokens" = sum over `num_items_in_batch`, the count of
        supervised tokens over all of them.
        """
        decoding = past_key_values is not None and bool(getattr(past_key_values, "stages", None))
        record = record if record is not None else Record(trace=return_trace)
        plan = None if decoding else resolve_plan(reduction, self.config)[0]
        if decoding and any(value is not None for value in (images, pixel_values, labels)):
            raise ValueError("pictures and labels need a new prefill; the cache is filled already")
        if not decoding and sequence is None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("give exactly one of input_ids, inputs_embeds and sequence")
            if inputs_embeds is None:
                sequence = self.build_sequence(
                    input_ids,
                    attention_mask,
                    labels,
                    images,
                    image_sizes,
                    kind="packed" if packed else None,
                    splice=splice,
                    pixel_values=pixel_values,
                    texts=texts,
                    soft_tokens=soft_tokens,
                )
            else:
                sequence = text_sequence(inputs_embeds, attention_mask, labels)
        is_packed = sequence is not None and sequence.layout.kind == "packed"
        if use_cache is None and (self.training or is_packed):
            use_cache = False
        outputs = self.model(
            input_ids=input_ids if decoding else None,
            inputs_embeds=inputs_embeds if decoding else None,
            past_key_values=past_key_values,
            use_cache=use_cache,
            sequence=sequence,
            plan=plan,
            record=record,
            **{key: value for key, value in kwargs.items() if key.startswith("output_")},
        )
        hidden = outputs.last_hidden_state
        supervised = record.sequence is not None and bool(record.sequence.layout.targets)
        loss = None
        if logits_to_keep == "targets":
            if not supervised:
                raise ValueError("logits_to_keep='targets' needs labels")
            hidden, target = self._target_rows(record.sequence)  # hidden is normed there
            logits = self.lm_head(hidden)
            loss = next_token_loss(logits, target, loss_mean, num_items_in_batch)
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            if supervised and not logits_to_keep:
                target = record.sequence.target.flatten()
                loss = next_token_loss(logits.flatten(0, 1), target, loss_mean, num_items_in_batch)
        traced = record if return_trace else Record()
        return LlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            sequence=traced.sequence,
            trace=tuple(traced.cuts) if return_trace else None,
            stages=traced.stages if return_trace else None,
        )

    @staticmethod
    def _target_rows(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
        """Hidden states [count, D] and targets [count] of the supervised rows, without a host read:
        their number is known from the labels and no cut changes it."""
        count = sum(sequence.layout.targets)
        target = sequence.target.flatten()
        is_target = target != IGNORE_INDEX
        slot = torch.where(is_target, is_target.cumsum(0) - 1, count)
        index = torch.zeros(count + 1, dtype=torch.long, device=target.device)
        arange = torch.arange(target.shape[0], device=target.device)
        index = index.scatter(0, slot, arange)[:-1]
        return sequence.hidden.flatten(0, 1).index_select(0, index), target[index]

    # Generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        reduction: Any = None,
        pixel_values: Any = None,
        texts: Mapping[str, Tensor] | None = None,
        prefix: Prefix | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate for a batch with pictures; returns the new tokens only.

        inputs (or input_ids), attention_mask, images, image_sizes, texts: as `build_sequence`,
        padded on either side; or sequence=, from `build_sequence`. prefix: from `encode_prefix`;
        sequence then holds the questions alone, from `build_suffixes`. With pixel_values, from a
        llava-hf processor, the prompt's ids stand in front of the new tokens, as in transformers.
        reduction: as in `forward`; it holds for this call alone. A plan with ``rerank=True`` makes
        its cuts anew for every token and keeps no cache. Greedy, sampling, beam search,
        num_return_sequences and streamers work, for batches. Raises ValueError for what cannot be
        right with layers of different lengths: use_cache=False, a static or quantised cache, a
        cache of the caller, chunked prefill, assisted decoding.
        """
        input_ids = kwargs.pop("input_ids", None)
        input_ids = inputs if input_ids is None else input_ids
        kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        sequence = kwargs.pop("sequence", None)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds is not accepted; give ids with images, or a sequence")
        if (input_ids is None) == (sequence is None):
            raise ValueError("give input_ids, or a sequence from build_sequence")
        self._refuse(kwargs)
        if sequence is None:
            sequence = self.build_sequence(
                input_ids,
                attention_mask,
                None,
                images,
                image_sizes,
                kind="left",
                pixel_values=pixel_values,
                texts=texts,
            )
        if prefix is None:
            sequence = sequence.relayout("left")
            reduction = resolve_plan(reduction, self.config)[0]
        else:
            prefix.check(sequence, reduction)
            reduction = prefix.plan
        if pixel_values is not None or (self.prompt_in_output and images is None):
            kwargs["input_ids"] = input_ids
        prompt = kwargs.get("input_ids")
        return super().generate(
            inputs_embeds=sequence.hidden,
            attention_mask=(sequence.origin >= 0).long(),
            sequence=sequence,
            reduction=reduction,
            prefix=prefix,
            prompt_ids=0 if prompt is None else prompt.shape[1],
            **kwargs,
        )

    @staticmethod
    def _refuse(kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config")

        def asked(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        if kwargs.get("use_cache") is False:
            raise ValueError(
                "use_cache=False is not accepted: generation needs the KV cache; to choose tokens "
                "anew at every step add rerank=True to the plan"
            )
        if asked("prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size is not accepted: a cut needs the whole prompt")
        if asked("prompt_lookup_num_tokens") is not None or kwargs.get("assistant_model"):
            raise ValueError("assisted decoding is not accepted: its drafts would skip the cuts")
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values is not accepted by generate; call forward to continue on a cache"
            )
        if asked("cache_implementation") not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation {asked('cache_implementation')!r} cannot hold stages of "
                "different lengths; accepted: dynamic, offloaded"
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        offloading = generation_config.cache_implementation == "offloaded"
        cache = StagedCache(self.config, offloading=offloading)
        # The cache stays empty until the first forward, so that transformers slices nothing.
        cache.prefix = model_kwargs.pop("prefix", None)
        model_kwargs["past_key_values"] = cache

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        sequence = model_kwargs.pop("sequence")
        ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if expand_size > 1:
            sequence = sequence.repeat_interleave(expand_size)
        return ids, {**model_kwargs, "sequence": sequence}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        sequence: TokenSequence | None = None,
        reduction: Any = None,
        prefix: Prefix | None = None,  # named for transformers' check; the cache brings it along
        prompt_ids: int = 0,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """prompt_ids: how many of `input_ids` [B, n] are the prompt's; the rest are new."""
        shared = {key: value for key, value in kwargs.items() if key.startswith("output_")}
        shared |= {"past_key_values": past_key_values, "use_cache": True}
        shared["logits_to_keep"] = logits_to_keep
        if past_key_values.stages:
            return {**shared, "input_ids": input_ids[:, -(next_sequence_length or 1) :]}
        if reduction.rerank:
            # The whole text so far, uncut: the newest token ranks. generate() insists on a cache,
            # which stays empty here.
            new = self.get_model().embed_tokens(input_ids[:, prompt_ids:])
            sequence = sequence.extended(new) if new.shape[1] else sequence
            shared |= {"past_key_values": None, "use_cache": False}
        return {**shared, "sequence": sequence, "reduction": reduction}


def next_token_loss(
    logits: Tensor,
    target: Tensor,
    mean: Literal["batch", "tokens"],
    num_items: Tensor | int | None,
) -> Tensor:
    """Cross-entropy of logits [n, V] with targets [n] that are shifted already.

    ValueError for an unknown mean or "tokens" without the count. A batch without a target gives 0
    with a graph, so that every rank has a backward pass.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
    if mean == "batch":
        return total / (target != IGNORE_INDEX).sum().clamp_min(1)
    if mean != "tokens":
        raise ValueError(f"loss_mean {mean!r} is unknown; accepted: batch, tokens")
    if num_items is None:
        raise ValueError("loss_mean 'tokens' needs num_items_in_batch, the count over all ranks")
    return total / num_items
