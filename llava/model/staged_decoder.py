"""The staged loop: a decoder forward in which visual tokens leave between layers.

Layers, norms and rotary tables are transformers' own. A plan splits the layers into stages of equal
length; between two stages the loop measures what the method asked for, hands it the visual tokens
as dense ``[groups, tokens]`` tensors and moves everything that stays in one gather. Without a plan
there is one stage. Training, prefill and decode, every method and every decoder family run here,
and no method is named here.

The only way to use a layer's weights outside its forward is ``layer(hidden, via=function)``: it
goes through the layer's own call, so the hooks of ZeRO-3, FSDP2, `device_map` and checkpointing
fire.

Nothing is read back from the device: lengths and counts come from `ReductionPlan.schedule`. The one
exception is a method that says it may keep fewer tokens than its budget (`counts_known`): the
counts of its cut are read, once, and the schedule goes on from them.

Shape suffixes: B samples · R rows · W width · D hidden · S samples that score · Q scoring rows ·
L keys of a sample · G groups · N visual tokens of the largest group · H query heads · K key heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import rotate_half
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llava.constants import IGNORE_INDEX
from llava.model.attention_kinds import FULL, SLIDING, attention_kind
from llava.model.layer_programs import LayerRunner, layer_runner
from llava.model.staged_cache import StagedCache
from llava.model.varlen_attention import VARLEN
from llava.reduction.base import SideText, Signal, View, counts_known, missing_text
from llava.reduction.plan import Cut, ReductionPlan, StageFacts
from llava.sequence import (
    BLANK,
    GRID,
    GROUP,
    ORIGIN,
    POSITION,
    QUERY,
    ROW,
    TARGET,
    Kind,
    Layout,
    TokenSequence,
    dense_positions,
)


@dataclass
class CutTrace:
    """What one cut saw and did. at: first layer behind it. layout: before the cut. valid, origin,
    keep: [G, N]. score: [G, N] or None."""

    at: int
    layout: Layout
    valid: Tensor
    origin: Tensor
    keep: Tensor
    score: Tensor | None


@dataclass
class Record:
    """Filled by a forward pass for its caller: the sequence behind the last layer, the stages and,
    when `trace` is set, every cut. replay: keep masks [G, N] to use instead of asking the method
    (tests compare two backends on the same kept sets). watch: a layer whose input becomes
    `watched`."""

    trace: bool = False
    replay: Sequence[Tensor] = ()
    sequence: TokenSequence | None = None
    stages: tuple[StageFacts, ...] = ()
    cuts: list[CutTrace] = field(default_factory=list)
    watch: int | None = None
    watched: Tensor | None = None

    def see(self, index: int, hidden: Tensor) -> None:
        """The loop is about to run layer `index` on `hidden`."""
        if index == self.watch:
            self.watched = hidden


class StagedLayer:
    """Mixin in front of a decoder layer: ``layer(x, via=f)`` runs ``f(layer, x, ...)``."""

    def forward(self, hidden_states: Tensor, *args: Any, via: Any = None, **kwargs: Any) -> Any:
        if via is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return via(self, hidden_states, *args, **kwargs)


class StagedModelMixin:
    """Mixin in front of a transformers decoder (`LlamaModel`, ...).

    A subclass names `staged_layer_class`, its decoder layer with `StagedLayer` in front.
    """

    staged_layer_class: type[nn.Module]
    # What the transformers class behind this mixin provides.
    config: Any
    layers: Any
    embed_tokens: Any
    norm: Any
    rotary_emb: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for layer in self.layers:
            # The staged class adds a method and no state, so the layer need not be built twice.
            layer.__class__ = self.staged_layer_class

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        sequence: TokenSequence | None = None,
        plan: ReductionPlan | None = None,
        record: Record | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Prefill or training when the cache is empty or absent, else decode on the cache.

        sequence: the uncut batch. Without it the ids or embeddings [B, L] are taken as text, padded
        as `attention_mask` [B, L] says. position_ids are derived and not read. Raises ValueError
        for a foreign cache and for attention maps, which no fast kernel returns.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is not available; for the scores of a cut ask for return_trace"
            )
        if past_key_values is not None and not isinstance(past_key_values, StagedCache):
            raise ValueError(
                f"{type(past_key_values).__name__} cannot hold stages of different lengths; "
                "accepted: None or StagedCache"
            )
        if past_key_values is not None and past_key_values.stages:
            if sequence is not None:
                raise ValueError("a new picture needs a new prefill; the cache already holds one")
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = self._decode(hidden, past_key_values, kwargs)
            return BaseModelOutputWithPast(self.norm(hidden), past_key_values)
        if sequence is None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("give exactly one of input_ids, inputs_embeds and sequence")
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            sequence = text_sequence(hidden, attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = StagedCache(self.config)
        hidden = self.pdrop_forward(
            sequence,
            plan if plan is not None else ReductionPlan(),
            past_key_values if use_cache else None,
            record if record is not None else Record(),
            kwargs,
        )
        return BaseModelOutputWithPast(hidden, past_key_values if use_cache else None)

    def pdrop_forward(
        self,
        sequence: TokenSequence,
        plan: ReductionPlan,
        cache: StagedCache | None,
        record: Record,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run all layers with the cuts of `plan`; normed hidden state [R, W', D] of what is left.

        record.sequence becomes the sequence behind the last layer, in the caller's layout.
        """
        caller_kind, first = sequence.layout.kind, 0
        measured: dict[Signal, Tensor] = {}
        if cache is not None and cache.prefix is not None:
            caller_kind, first = "left", cache.prefix.depth
            sequence, stages, measured = cache.prefix.join(self, sequence, cache, kwargs)
        else:
            if cache is not None:
                if caller_kind == "packed":
                    raise ValueError("a packed batch cannot fill a cache; accepted: padded batches")
                sequence = sequence.relayout("left")
            check_layout_texts(plan, sequence.layout)
            sequence = with_embeds(sequence, plan)
            stages = plan.schedule(sequence.layout, len(self.layers))
        layers = range(first, len(self.layers))
        sequence, stages = self.run_stages(
            sequence, stages, layers, plan, cache, record, kwargs, measured=measured
        )
        if sequence.layout.kind != caller_kind:
            sequence = sequence.relayout(caller_kind)
        sequence.hidden = self.norm(sequence.hidden)
        record.sequence, record.stages = sequence, stages
        return sequence.hidden

    def run_stages(
        self,
        sequence: TokenSequence,
        stages: tuple[StageFacts, ...],
        layers: range,
        plan: ReductionPlan,
        cache: StagedCache | None,
        record: Record,
        kwargs: dict[str, Any],
        *,
        measured: dict[Signal, Tensor] | None = None,
    ) -> tuple[TokenSequence, tuple[StageFacts, ...]]:
        """Some layers and the cuts in front of them: the sequence behind the last, not normed, and
        the stages as they ran.

        sequence: at the input of the first of `layers`. stages: of all layers. measured: what a cut
        right in front of `layers` wants of the layer before it.
        """
        sequence = replace(sequence)  # the caller's object stays as it is
        runner = None if cache is None else cache.runner
        if runner is None:
            runner = layer_runner(plan.program, self.config)
        if cache is not None:
            cache.runner = runner
        facts = upload_facts(stages, sequence.facts.device)
        rotary = self.rotary_emb(sequence.hidden, position_ids=sequence.position)
        measured = measured or {}
        for number in range(len(stages)):
            cut = stages[number].cut
            if cut is not None and cut.at in layers:
                # A cut at layer 0 has no layer in front of it; else the previous stage measured.
                sequence, choice = self._choose(
                    sequence, stages[number], facts[number], rotary, measured, record
                )
                if not counts_known(cut.reducer):
                    stages = replan(plan, stages, number, choice)
                    facts = upload_facts(stages, sequence.facts.device)
                sequence = self.pdrop_rank_drop(
                    sequence, choice, stages[number], facts[number], plan
                )
                rotary = self.rotary_emb(sequence.hidden, position_ids=sequence.position)
            stage = stages[number].within(layers)
            if stage.start >= stage.stop:  # a cut before the LLM: no layer sees it uncut
                continue
            following = stages[number + 1].cut if number + 1 < len(stages) else None
            if following is not None and following.at not in layers:
                following = None
            hidden, measured = self._run_stage(
                sequence, stage, following, rotary, cache, runner, record, kwargs
            )
            sequence.hidden = hidden
            if hidden.device != sequence.facts.device:
                sequence = sequence.to(hidden.device)
                rotary = tuple(table.to(hidden.device) for table in rotary)
        return sequence, stages

    def _run_stage(
        self,
        sequence: TokenSequence,
        stage: StageFacts,
        following: Cut | None,
        rotary: tuple[Tensor, Tensor],
        cache: StagedCache | None,
        runner: LayerRunner | None,
        record: Record,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, dict[Signal, Tensor]]:
        """Layers of equal length: their output, and what the following cut wants measured at the
        input of the last of them."""
        layers = range(stage.start, stage.stop)
        opened = None if cache is None else cache.open(stage.start, stage.stop, sequence)
        context = attend(self.config, sequence, cache, stock_layers(layers, runner))
        prepared = None
        if runner is not None:
            prepared = runner.open(sequence, rotary, layers, opened)
        measured: dict[Signal, Tensor] = {}
        hidden = sequence.hidden
        for index in layers:
            record.see(index, hidden)
            extra = {} if runner is None else runner.extra(index, prepared)
            here = replace(sequence, hidden=hidden)
            hidden = self.layers[index](
                hidden,
                attention_mask=context.masks.get(attention_kind(self.config, index)),
                position_ids=None,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotary,
                **context.kwargs,
                **extra,
                **kwargs,
            )
            if following is not None and index == stage.stop - 1:
                stored = None if extra else cache
                measured = self._measure(following, -1, here, rotary, stored)
        return hidden, measured

    def _choose(
        self,
        sequence: TokenSequence,
        stage: StageFacts,
        facts: CutFacts,
        rotary: tuple[Tensor, Tensor],
        measured: dict[Signal, Tensor],
        record: Record,
    ) -> tuple[TokenSequence, Choice]:
        """Measure and let the method choose; the sequence comes back with the groups that competed.

        Works on a detached copy of the scores' inputs, so no gradient flows through the ranking.
        """
        cut, before = stage.cut, stage.before
        assert cut is not None
        assert before is not None
        facts = facts.to(sequence.hidden.device)
        if len(stage.regroup) != len(before.groups):
            sequence = sequence.regroup(facts.regroup, before)
        tokens = {**measured, **self._measure(cut, 0, sequence, rotary)}
        texts = self._texts(cut, sequence, facts.samples)
        order_V = sequence.visual_order()
        table_GN, valid_GN = order_V[facts.slots], facts.slots >= 0
        facts_GNF = sequence.facts.flatten(0, 1)[table_GN]
        mix = score = None
        if record.replay:
            keep_GN = record.replay[len(record.cuts)]
        elif valid_GN.numel() == 0:  # no picture, or nothing left of them: no choice to make
            keep_GN = valid_GN
        else:
            protected = torch.zeros_like(valid_GN)
            if any(group.protected for group in before.groups):
                protected = (facts_GNF[..., TARGET] != IGNORE_INDEX) & valid_GN
            view = View(
                valid=valid_GN,
                protected=protected,
                cell=facts_GNF[..., ROW:],
                grid=facts_GNF[..., GRID],
                origin=facts_GNF[..., ORIGIN],
                seed=sequence.inputs["seed"][facts.samples],
                count=facts.counts,
                budget=facts.budgets,
                max_budget=max(stage.budgets, default=0),
                signals={signal: each.flatten(0, 1)[table_GN] for signal, each in tokens.items()},
                texts=texts,
            )
            with torch.no_grad():
                selection = cut.reducer.select(view)
            keep_GN, score, mix = selection.keep, selection.score, selection.mix
        if record.trace or record.replay:
            origin_GN = facts_GNF[..., ORIGIN]
            record.cuts.append(CutTrace(cut.at, before, valid_GN, origin_GN, keep_GN, score))
        if mix is not None:
            sequence = sequence.mixed(table_GN, valid_GN, mix)
        return sequence, Choice(order_V, keep_GN)

    def pdrop_rank_drop(
        self,
        sequence: TokenSequence,
        choice: Choice,
        stage: StageFacts,
        facts: CutFacts,
        plan: ReductionPlan,
    ) -> TokenSequence:
        """One cut: the sequence without the visual tokens that were not chosen."""
        facts = facts.to(sequence.hidden.device)
        return sequence.keep(
            choice.order,
            choice.keep.flatten()[facts.inverse],
            stage.layout,
            facts.bounds,
            renumber=plan.positions == "renumber",
        )

    @torch.no_grad()
    def _texts(
        self, cut: Cut, sequence: TokenSequence, samples_G: Tensor
    ) -> dict[Signal, SideText]:
        """The texts a method compares with, each embedded by one call of the embedding module,
        which every rank makes, whatever its batch holds."""
        texts: dict[Signal, SideText] = {}
        for signal in cut.reducer.signals:
            if signal.kind != "text":
                continue
            ids_BT = text_ids(sequence, signal)
            embeds_BTD = self.embed_tokens(ids_BT.clamp_min(0)).to(sequence.hidden.device)
            texts[signal] = SideText(embeds_BTD[samples_G], (ids_BT >= 0)[samples_G])
        return texts

    def _measure(
        self,
        cut: Cut,
        offset: int,
        sequence: TokenSequence,
        rotary: tuple[Tensor, Tensor],
        cache: StagedCache | None = None,
    ) -> dict[Signal, Tensor]:
        """The signals of one offset as token-aligned tensors [R, W, ...].

        sequence: with the hidden state at the input of the measured layer. cache: one in which that
        layer has stored its keys already.
        """
        wanted = [
            signal
            for signal in cut.reducer.signals
            if signal.offset == offset and signal.kind != "text"
        ]
        measured: dict[Signal, Tensor] = {}
        for signal in wanted:
            if signal.kind == "hidden":
                measured[signal] = sequence.hidden.detach()
            elif signal.kind == "embeds":
                # At a cut before the first layer the hidden states still are the embeddings.
                measured[signal] = sequence.extra.get("embeds", sequence.hidden).detach()
            elif signal.kind == "extra":
                measured[signal] = sequence.extra[signal.name]
            else:
                measured[signal] = self._probe(cut.at + offset, signal, sequence, rotary, cache)
        return measured

    @torch.no_grad()
    def _probe(
        self,
        index: int,
        signal: Signal,
        sequence: TokenSequence,
        rotary: tuple[Tensor, Tensor],
        cache: StagedCache | None,
    ) -> Tensor:
        """Ask one layer for a signal. Every rank calls every probe, whatever its batch holds."""
        layer, hidden = self.layers[index], sequence.hidden.detach()
        if signal.kind == "keys":
            _, keys = layer(hidden, via=partial(layer_keys, norm=signal.norm))
            return keys.to(hidden.device)
        window = None
        if attention_kind(self.config, index) == SLIDING:
            window = self.config.sliding_window
        tables = scoring_tables(sequence)
        allowed_SL = tables.keys_valid
        if signal.over == "visual":
            visual = sequence.facts[..., GROUP] >= 0
            visual = visual if tables.keys is None else visual.flatten()[tables.keys]
            allowed_SL = visual if allowed_SL is None else allowed_SL & visual
        stored = None
        if cache is not None and signal.rope and signal.norm:
            stored = cache.prompt_keys(index)
        via = partial(layer_attention, norm=signal.norm, rope=signal.rope, window=window)
        _, mass_SLH = layer(
            hidden,
            *rotary,
            tables.rows,
            tables.columns,
            tables.weight,
            tables.keys,
            allowed_SL,
            stored,
            via=via,
        )
        mass_SLH = mass_SLH.to(hidden.device)
        mass = mass_SLH if signal.heads else mass_SLH.mean(-1)
        if tables.keys is None:
            return mass
        return mass.flatten(0, 1)[tables.place][None]

    def _decode(
        self,
        hidden: Tensor,
        cache: StagedCache,
        kwargs: dict[str, Any],
        record: Record | None = None,
    ) -> Tensor:
        """Text tokens [B, q, D] through the layers that the cache has opened: each is attended to
        in the layers it reached."""
        count = hidden.shape[1]
        steps = [cache.step(stage, count) for stage in cache.stages]
        # One call for the rotary tables of all stages.
        positions = torch.cat([position.to(hidden.device) for position, _ in steps])
        tables = self.rotary_emb(hidden, position_ids=positions)
        tables = [table.chunk(len(steps)) for table in tables]
        for number, (stage, (_, valid)) in enumerate(zip(cache.stages, steps, strict=True)):
            layers, runner = range(stage.start, stage.stop), cache.runner
            masks = _masks(self.config, hidden, valid, cache, stock_layers(layers, runner))
            prepared = None
            if runner is not None:
                prepared = runner.step(stage, cache.seen(stage), count, hidden)
            for index in layers:
                if record is not None:
                    record.see(index, hidden)
                extra = {} if runner is None else runner.extra(index, prepared)
                hidden = self.layers[index](
                    hidden,
                    attention_mask=masks.get(attention_kind(self.config, index)),
                    position_ids=None,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=(tables[0][number], tables[1][number]),
                    **extra,
                    **kwargs,
                )
        return hidden


# Probes: functions that run inside a layer's own call


def layer_keys(layer: Any, hidden: Tensor, *, norm: bool) -> tuple[None, Tensor]:
    """Unrotated keys [R, W, kv_heads * head_dim] of a layer."""
    x = layer.input_layernorm(hidden) if norm else hidden
    return None, _project(layer.self_attn, "k", x).flatten(2)


def layer_attention(
    layer: Any,
    hidden_RWD: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows_SQ: Tensor,
    columns_SQ: Tensor,
    weight_SQ: Tensor | None,
    keys_SL: Tensor | None,
    allowed_SL: Tensor | None,
    stored_SKLd: Tensor | None = None,
    *,
    norm: bool,
    rope: bool,
    window: int | None,
) -> tuple[None, Tensor]:
    """Probability mass [S, L, H] that the scoring rows put on the keys, mean over the rows.

    rows_SQ: flat indices of the scoring rows; columns_SQ: their place among the keys of their
    sample; weight_SQ: weight of each row, None = one row a sample. keys_SL: flat indices of the
    keys (packed), None = a row is a sample. allowed_SL: keys that count, None = all. stored_SKLd:
    rotated keys that the layer has made already. Only the scoring rows are projected to queries and
    no L x L map is made, so fast kernels stay on for the layers themselves. Softmax in float32.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm if norm else (lambda x: x)
    if rope:
        cos, sin = (table.expand(*hidden_RWD.shape[:2], -1) for table in (cos, sin))
    if stored_SKLd is not None:
        key, x_SQD = stored_SKLd, normed(hidden_RWD.flatten(0, 1)[rows_SQ])
    else:
        x_RWD = normed(hidden_RWD)
        x_SQD = x_RWD.flatten(0, 1)[rows_SQ]
        key = _project(attention, "k", x_RWD)
        if rope:
            key = key * cos[:, :, None] + rotate_half(key) * sin[:, :, None]
        if keys_SL is not None:
            key = key.flatten(0, 1)[keys_SL]
        key = key.transpose(1, 2)
    query = _project(attention, "q", x_SQD)
    if rope:
        cos, sin = (table.flatten(0, 1)[rows_SQ][:, :, None] for table in (cos, sin))
        query = query * cos + rotate_half(query) * sin
    samples, rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    query = query.view(samples, rows, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    logits = query.flatten(2, 3) @ key.transpose(2, 3)
    logits = logits.view(samples, heads, rows, -1).float() * attention.scaling
    column = torch.arange(logits.shape[-1], device=logits.device)
    unseen = column > columns_SQ[..., None]
    if window is not None:
        unseen = unseen | (column <= columns_SQ[..., None] - window)
    if allowed_SL is not None:
        unseen = unseen | ~allowed_SL[:, None]
    logits = logits.masked_fill(unseen[:, None], torch.finfo(torch.float32).min)
    mass = logits.softmax(-1)
    if weight_SQ is None:
        return None, mass[:, :, 0].transpose(1, 2)
    return None, (mass * weight_SQ[:, None, :, None]).sum(2).transpose(1, 2)


def _project(attention: Any, name: str, x: Tensor) -> Tensor:
    """Heads [..., heads, head_dim] of the q or k projection, normed per head where the family does
    (Qwen3). Dropout inside an adapter is off: it would make the ranking random."""
    projection = getattr(attention, f"{name}_proj")
    with _without_dropout(projection):
        heads = projection(x).unflatten(-1, (-1, attention.head_dim))
    head_norm = getattr(attention, f"{name}_norm", None)
    return heads if head_norm is None else head_norm(heads)


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    active = [
        child for child in module.modules() if child.training and isinstance(child, nn.Dropout)
    ]
    with ExitStack() as stack:
        for child in active:
            child.eval()
            stack.callback(child.train)
        yield


# Tables and masks: where the layouts are told apart


@dataclass
class Choice:
    """What a method chose. order [V]: `TokenSequence.visual_order`. keep [G, N]."""

    order: Tensor
    keep: Tensor


def replan(
    plan: ReductionPlan, stages: tuple[StageFacts, ...], number: int, choice: Choice
) -> tuple[StageFacts, ...]:
    """The stages, given what the cut in front of stage `number` has really left: the one documented
    host read, for a method that may keep fewer tokens than its budget."""
    counts = {earlier: stages[earlier].budgets for earlier in range(1, number)}
    counts[number] = tuple(choice.keep.sum(1).tolist())
    return plan.schedule(stages[0].layout, stages[-1].stop, counts)


def with_embeds(sequence: TokenSequence, plan: ReductionPlan) -> TokenSequence:
    """The rows that enter the first layer travel along where a later cut asks for them."""
    later = (signal for cut in plan.cuts if cut.at for signal in cut.reducer.signals)
    if all(signal.kind != "embeds" for signal in later):
        return sequence
    return replace(sequence, extra={**sequence.extra, "embeds": sequence.hidden.detach()})


def check_layout_texts(plan: ReductionPlan, layout: Layout) -> None:
    """ValueError for a sample with a picture that lacks a text its plan compares with.

    A training sample without a supervised token is not cut and needs none.
    """
    counts = dict(layout.texts)
    with_pictures = sorted({group.sample for group in layout.groups})
    for signal in plan.texts if with_pictures else ():
        known = [name for name in signal.alternatives if name in counts]
        if not known:
            raise ValueError(
                f"the plan compares with the text {signal.name!r}, which did not come with the "
                f"batch; give texts= as `llava.prompting.prepare_batch` returns them (here: "
                f"{', '.join(counts)})"
            )
        for sample in with_pictures:
            if layout.queries[sample] and not any(counts[name][sample] for name in known):
                raise ValueError(f"sample {sample} of the batch {missing_text(signal)}")


def text_ids(sequence: TokenSequence, signal: Signal) -> Tensor:
    """Ids [B, T] of a text, -1 = filling: of each sample's first alternative that is not empty."""
    ids = sequence.inputs["seed"].new_full((len(sequence.layout.lengths), 1), -1)
    for name in reversed(signal.alternatives):
        first = sequence.inputs.get(f"text:{name}")
        if first is None:
            continue
        width = max(first.shape[1], ids.shape[1])
        first, ids = (F.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in (first, ids))
        ids = torch.where((first >= 0).any(1, keepdim=True), first, ids)
    return ids


@dataclass
class CutFacts:
    """The integers of one cut on the device.

    slots [G, N]: which of the visual tokens, sorted by group, is token n of group g (-1: none).
    inverse [V]: place of each visual token in `slots` flattened. counts, budgets, samples [G].
    regroup [old G]: new number of each group. bounds [B, 2]: of the layout behind the cut.
    """

    slots: Tensor
    inverse: Tensor
    counts: Tensor
    budgets: Tensor
    samples: Tensor
    regroup: Tensor
    bounds: Tensor

    def to(self, device: torch.device) -> CutFacts:
        if self.slots.device == device:
            return self
        return CutFacts(*(getattr(self, each.name).to(device) for each in fields(self)))


def upload_facts(stages: Sequence[StageFacts], device: torch.device) -> tuple[CutFacts, ...]:
    """The integers of all cuts, in one copy to the device. Entry 0 (no cut) has no group."""
    arrays: list[np.ndarray] = []
    for stage in stages:
        before = stage.before or replace(stage.layout, groups=())
        slots = before.slots()
        arrays += [
            slots,
            np.flatnonzero(slots >= 0),
            np.array([group.count for group in before.groups], dtype=np.int64),
            np.array(stage.budgets if stage.before else (), dtype=np.int64),
            np.array([group.sample for group in before.groups], dtype=np.int64),
            np.array(stage.regroup, dtype=np.int64),
            np.array(stage.layout.bounds(), dtype=np.int64),
        ]
    shaped = upload(arrays, device)
    return tuple(CutFacts(*shaped[i : i + 7]) for i in range(0, len(shaped), 7))


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integer arrays on the device, in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


@dataclass
class ScoringTables:
    """rows [S, Q]: flat indices of the scoring rows. columns [S, Q]: their place among the keys of
    their sample. weight [S, Q]: 1/n for the n rows of a sample, 0 for filling; None when Q is 1.
    keys [S, L]: flat indices of the keys and place [T]: where each token is among them; None when a
    row is a sample. keys_valid [S, L]: None when all keys are real."""

    rows: Tensor
    columns: Tensor
    weight: Tensor | None
    keys: Tensor | None
    place: Tensor | None
    keys_valid: Tensor | None


def scoring_tables(sequence: TokenSequence) -> ScoringTables:
    """Where the scoring rows and the keys of each sample stand.

    A sample without a scoring row (text without supervision) gets row 0: every rank then makes the
    same calls, and no cut uses the result.
    """
    layout, device = sequence.layout, sequence.facts.device
    most = max(max(layout.queries, default=0), 1)
    query, keys, place, keys_valid = sequence.query, None, None, sequence.valid
    if layout.kind == "packed":
        table = np.full((len(layout.lengths), max(layout.lengths)), -1)
        for sample, (start, length) in enumerate(layout.bounds()):
            table[sample, :length] = np.arange(start, start + length)
        place = torch.from_numpy(np.flatnonzero(table >= 0)).to(device, non_blocking=True)
        keys = torch.from_numpy(table).to(device, non_blocking=True)
        keys_valid, keys = keys >= 0, keys.clamp_min(0)
        query = query.flatten()[keys] * keys_valid
    # A stable sort puts the scoring rows in front, in their order.
    flags, columns = query.sort(dim=1, descending=True, stable=True)
    flags, columns = flags[:, :most], columns[:, :most]
    if keys is None:
        width = layout.width
        rows = columns + torch.arange(0, query.numel(), width, device=device)[:, None]
    else:
        rows = keys.gather(1, columns)
    weight = None if most == 1 else flags / flags.sum(1, keepdim=True).clamp_min(1)
    return ScoringTables(rows, columns, weight, keys, place, keys_valid)


@dataclass
class AttendContext:
    """masks: attention mask by kind of layer. kwargs: further arguments for every layer."""

    masks: dict[str, Any]
    kwargs: dict[str, Any]


def stock_layers(layers: range, runner: LayerRunner | None) -> Sequence[int]:
    """Those of `layers` that run their own forward."""
    return [index for index in layers if runner is None or not runner.runs(index)]


def attend(
    config: Any, sequence: TokenSequence, cache: StagedCache | None, layers: Sequence[int]
) -> AttendContext:
    """Masks or varlen arguments of `layers`, made once. Only this function knows the layout."""
    if sequence.layout.kind == "packed":
        return _attend_packed(config, sequence, layers)
    # Padding on the right is never seen by a causal row of a real token: no mask is needed.
    valid = sequence.valid if sequence.layout.kind == "left" else None
    return AttendContext(_masks(config, sequence.hidden, valid, cache, layers), {})


def _masks(
    config: Any,
    hidden: Tensor,
    valid: Tensor | None,
    cache: StagedCache | None,
    layers: Sequence[int],
) -> dict[str, Any]:
    """Causal masks for `layers`, one a kind, sized from the cache layer of that kind.

    Positions are not passed on: transformers would read gaps in them as borders between packed
    samples. With padding the mask is built without the shortcut that reads it on the host.
    """
    masks: dict[str, Any] = {}
    for index in layers:
        kind = attention_kind(config, index)
        if kind in masks:
            continue
        create = create_causal_mask if kind == FULL else create_sliding_window_causal_mask
        masks[kind] = create(
            config=config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            layer_idx=index,
            allow_is_causal_skip=valid is None,
        )
    return masks


def _attend_packed(config: Any, sequence: TokenSequence, layers: Sequence[int]) -> AttendContext:
    """Samples one behind the other must not see each other.

    flash_attention_2 and our own "varlen" take transformers' four varlen arguments. eager and sdpa
    would ignore those silently, so they get a block-diagonal mask [1, 1, T, T]: the reference,
    quadratic in the pack.
    """
    layout, device = sequence.layout, sequence.hidden.device
    kinds = {attention_kind(config, index) for index in layers}
    backend = config._attn_implementation
    if backend in ("flash_attention_2", VARLEN):
        ends = torch.tensor([0, *layout.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = ends.to(device, non_blocking=True)
        longest = max(layout.lengths)
        kwargs = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return AttendContext(dict.fromkeys(kinds), kwargs)
    if backend not in ("eager", "sdpa"):
        raise ValueError(
            f"packed batches with the attention backend {backend!r} would mix the samples; "
            "accepted: varlen, flash_attention_2, eager, sdpa"
        )
    bounds = torch.tensor(layout.bounds()).to(device, non_blocking=True)
    sample = torch.arange(len(layout.lengths), device=device)
    sample = sample.repeat_interleave(bounds[:, 1], output_size=layout.width)
    column = torch.arange(layout.width, device=device)
    causal = (sample[:, None] == sample) & (column[:, None] >= column)
    masks = {}
    for kind in kinds:
        seen = causal
        if kind == SLIDING:
            seen = causal & (column[:, None] - column < config.sliding_window)
        if backend == "eager":
            lowest = torch.finfo(sequence.hidden.dtype).min
            zero = torch.zeros((), dtype=sequence.hidden.dtype, device=device)
            masks[kind] = torch.where(seen, zero, lowest)[None, None]
        else:
            masks[kind] = seen[None, None]
    return AttendContext(masks, {})


def text_sequence(
    hidden_BLD: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None
) -> TokenSequence:
    """Text embeddings [B, L, D] as a sequence; labels [B, L] become shifted targets.

    Mask and labels are read once on the host, for the lengths and the number of targets.
    """
    batch, width = hidden_BLD.shape[:2]
    lengths: tuple[int, ...] = (width,) * batch
    kind: Kind = "left"
    if attention_mask is not None:
        rows = attention_mask.bool().cpu()
        lengths = tuple(int(count) for count in rows.sum(1))
        kind = padding_side(rows)
    device = hidden_BLD.device
    target = torch.full((batch, width), IGNORE_INDEX, device=device)
    targets: tuple[int, ...] = ()
    if labels is not None:
        target[:, :-1] = labels[:, 1:].to(device)
        targets = tuple(int(count) for count in (target != IGNORE_INDEX).sum(1).cpu())
    layout = Layout(lengths, (), (1,) * batch, kind, targets)
    bounds = torch.tensor(layout.bounds()).to(device, non_blocking=True)
    position = dense_positions(layout, bounds)
    column = torch.arange(width, device=device) - bounds[:, :1]
    valid = (column >= 0) & (column < bounds[:, 1:])
    facts = torch.tensor(BLANK).to(device, non_blocking=True).repeat(batch, width, 1)
    facts[..., POSITION] = position
    facts[..., ORIGIN] = torch.where(valid, position, -1)
    facts[..., TARGET] = target
    facts[..., QUERY] = column == bounds[:, 1:] - 1
    return TokenSequence(
        hidden=hidden_BLD,
        facts=facts,
        extra={},
        inputs={"seed": torch.zeros(batch, dtype=torch.long, device=device)},
        layout=layout,
    )


def padding_side(mask: Tensor) -> Kind:
    """ "left" or "right" for a bool mask [B, L] on the CPU; ValueError when a row has a hole or the
    rows disagree. A mask without padding counts as "left"."""
    lengths = mask.sum(1, keepdim=True)
    column = torch.arange(mask.shape[1])
    if bool((mask == (column >= mask.shape[1] - lengths)).all()):
        return "left"
    if bool((mask == (column < lengths)).all()):
        return "right"
    raise ValueError(
        "attention_mask has holes or mixes padding sides; accepted: all rows padded left or all "
        "rows padded right"
    )
