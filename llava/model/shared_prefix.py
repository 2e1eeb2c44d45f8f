"""Many questions about one picture: their common beginning runs once.

The longest common prefix of the prompts (template, picture, often the first words of the question)
goes through the layers in front of the first cut that reads the question, once a picture. Then each
question's own tokens run behind it through the same layers, padded on the right, so that prefix and
question are adjacent and every causal and window distance is right. One gather moves the cached
columns to ``[padding | prefix | question]``, the columns of the unshared path: the cuts and layers
that follow, decoding and beams know nothing of it, and kept sets, lengths, positions and tokens are
those of the unshared batch.

Cuts that do not read the question are made in the prefix, unless their counts are not known on the
host. A sliding window that could not hold prefix and question ends the shared part in front of its
layer, because the cache of such a layer has dropped columns by then. Plans that compare with texts
beside the prompt (Simignore) read the question before the first layer: only the tower is shared,
with whole prompts (`Splicer(image_index=)`).

    prefix = model.encode_prefix(model.build_sequence(prefix_ids, images=pixels), "none")
    model.generate(sequence=model.build_suffixes(ids, mask), prefix=prefix, max_new_tokens=16)

Nothing is read back from the device. Shape suffixes: P prefixes · B questions · W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.model.attention_kinds import SLIDING, attention_kind
from llava.model.staged_cache import StagedCache, StageRecord
from llava.model.staged_decoder import Record, stock_layers, upload, with_embeds
from llava.reduction.base import Signal, counts_known
from llava.reduction.plan import Cut, ReductionPlan, StageFacts
from llava.sequence import ORIGIN, POSITION, QUERY, Layout, TokenSequence


@dataclass(frozen=True)
class Joint:
    """Prefix and question in one stage. layout: of both, left-padded. bounds [B, 2]: of the layout.
    column [B, W]: where each column comes from (`Layout.append`). following [B]: position of the
    first token behind the prefix."""

    layout: Layout
    bounds: Tensor
    column: Tensor
    following: Tensor


@dataclass(frozen=True)
class Prefix:
    """P common beginnings behind the shared layers. Never changed: it may serve several calls.

    plan: what runs. depth: layers 0 .. depth-1 are done. questions: how many questions belong to
    each prefix, in order; None = all belong to the only one. room: tokens a question may have.
    uncut: the layout before any cut. layouts: of each of the cache's stages. sequence: at the input
    of layer `depth`. before: hidden state at the input of the layer in front of it, where the cut
    at `depth` wants to see it. cache: keys and values of the shared layers.
    """

    plan: ReductionPlan
    depth: int
    questions: tuple[int, ...] | None
    room: int
    uncut: Layout
    layouts: tuple[Layout, ...]
    sequence: TokenSequence
    before: Tensor | None
    cache: StagedCache

    def owners(self, rows: int) -> tuple[int, ...]:
        """The prefix of each of `rows` questions; with beams each question comes several times.

        ValueError when the number does not fit.
        """
        questions = self.questions or (1,)
        copies, rest = divmod(rows, sum(questions))
        if rest or not rows:
            raise ValueError(
                f"{rows} questions for prefixes with {list(questions)}; give one row a question"
            )
        return tuple(p for p, count in enumerate(questions) for _ in range(count * copies))

    def check(self, suffix: TokenSequence, reduction: Any = None) -> None:
        """ValueError for questions that cannot stand behind this prefix, and for another plan."""
        if reduction is not None and ReductionPlan.parse(reduction) != self.plan:
            raise ValueError(f"the prefix was made with the plan {self.plan}; got {reduction}")
        layout = suffix.layout
        self.owners(len(layout.lengths))
        if layout.groups or layout.targets:
            raise ValueError("questions behind a prefix are text without labels")
        if layout.kind == "packed" or (layout.kind == "left" and layout.is_padded):
            raise ValueError("questions behind a prefix are padded on the right")
        if not all(0 < length <= self.room for length in layout.lengths):
            raise ValueError(
                f"questions of {min(layout.lengths)} to {max(layout.lengths)} tokens; behind this "
                f"prefix 1 to {self.room} are accepted"
            )

    def join(
        self, decoder: Any, suffix: TokenSequence, cache: StagedCache, kwargs: dict[str, Any]
    ) -> tuple[TokenSequence, tuple[StageFacts, ...], dict[Signal, Tensor]]:
        """Run questions [B, W, D] through the shared layers and fill `cache` with both.

        Returns prefix and question as one left-padded sequence at the input of layer `depth`, the
        stages of the whole prompts, and what a cut at `depth` wants of the layer before it.
        """
        cache.prefix = None
        suffix = with_embeds(suffix, self.plan)
        owners = self.owners(len(suffix.layout.lengths))
        uncut, _ = self.uncut.take(owners).append(suffix.layout)
        stages = self.plan.schedule(uncut, len(decoder.layers))
        owner_B, length_B, first_B, joints = self._joints(owners, suffix)

        self._unfold(cache, owner_B, joints)
        record = Record(watch=None if self.before is None else self.depth - 1)
        hidden = suffix.hidden
        if self.depth:
            hidden = decoder._decode(hidden, cache, kwargs, record)
        for stage, joint in zip(cache.stages, joints, strict=False):
            place = torch.arange(joint.layout.width, device=owner_B.device)
            padded = joint.layout.is_padded
            stage.valid = place >= joint.bounds[:, :1] if padded else None
            layers = stock_layers(range(stage.start, stage.stop), cache.runner)
            cache.relay(layers, joint.column)
            if cache.runner is not None:
                cache.runner.relay(cache, stage, joint.column, joint.layout)
            stage.length = joint.layout.width
            stage.next_position = stage.next_position + length_B

        last = joints[-1]
        facts = suffix.facts.clone()
        facts[..., POSITION] += last.following[:, None]
        facts[..., ORIGIN] += torch.where(suffix.origin >= 0, first_B[:, None], 0)
        own = self.sequence.take(owners)
        own.facts[..., QUERY] = 0

        def whole(prefix_hidden: Tensor, suffix_hidden: Tensor) -> TokenSequence:
            text = replace(suffix, hidden=suffix_hidden, facts=facts)
            head = replace(own, hidden=prefix_hidden)
            return head.append(text, last.layout, last.column, last.bounds)

        measured = {}
        cut = _cut_at(self.plan, self.depth)
        if self.before is not None and cut is not None and record.watched is not None:
            here = whole(self.before.index_select(0, owner_B), record.watched)
            rotary = decoder.rotary_emb(here.hidden, position_ids=here.position)
            measured = decoder._measure(cut, -1, here, rotary, cache)
        return whole(own.hidden, hidden), stages, measured

    def _joints(
        self, owners: Sequence[int], suffix: TokenSequence
    ) -> tuple[Tensor, Tensor, Tensor, list[Joint]]:
        """Where the columns of prefix and question go, in one copy to the device.

        Returns the prefix of each question, its tokens, the tokens of its prefix before any cut
        [B], and one `Joint` a stage of the cache, with the one of the sequence behind them.
        """
        layouts = [layout.take(owners) for layout in (*self.layouts, self.sequence.layout)]
        joined = [layout.append(suffix.layout) for layout in layouts]
        first = np.array([self.uncut.lengths[owner] for owner in owners])
        arrays = [np.array(owners), np.array(suffix.layout.lengths), first]
        for before, (layout, column) in zip(layouts, joined, strict=True):
            # The last token of a prefix may be a visual one that was dropped: with original
            # positions the uncut length counts.
            original = self.plan.positions == "original"
            following = first if original else np.array(before.lengths)
            arrays += [np.array(layout.bounds()), column, following]
        owner_B, length_B, first_B, *rest = upload(arrays, suffix.facts.device)
        joints = [
            Joint(layout, *rest[3 * place : 3 * place + 3])
            for place, (layout, _) in enumerate(joined)
        ]
        return owner_B, length_B, first_B, joints

    def _unfold(self, cache: StagedCache, owner_B: Tensor, joints: Sequence[Joint]) -> None:
        """Give each question its own copy of the prefix's keys and values."""

        def rows(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == 1:  # no copy: the layers join the questions' own columns to it
                return tensor.expand(owner_B.shape[0], *tensor.shape[1:])
            return tensor.index_select(0, owner_B.to(tensor.device))

        for index in range(self.depth):
            cache.adopt(index, self.cache.layers[index], rows)
        cache.runner = None if self.cache.runner is None else self.cache.runner.copy()
        cache.stages = [
            StageRecord(
                stage.start,
                stage.stop,
                stage.length,
                None if stage.valid is None else rows(stage.valid),
                joint.following,
                {name: rows(value) for name, value in stage.extra.items()},
            )
            for stage, joint in zip(self.cache.stages, joints, strict=False)
        ]


def encode_prefix(
    decoder: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    *,
    questions: Sequence[int] | None,
    room: int,
) -> Prefix:
    """Run the common beginning of some prompts through the layers that all questions share.

    sequence: P prefixes without labels. questions: of each prefix, in order; may be None for one
    prefix. room: tokens a question may have. ValueError for numbers that do not fit.
    """
    layout = sequence.layout
    rows = len(layout.lengths)
    if layout.kind == "packed" or layout.targets:
        raise ValueError("a prefix is a padded batch without labels")
    reason = needs_whole_prompts(plan)
    if reason:
        raise ValueError(f"{plan} {reason}; give whole prompts")
    if (questions is None and rows != 1) or (questions is not None and len(questions) != rows):
        raise ValueError(
            f"{rows} prefixes with questions={questions!r}; give the number of questions of each"
        )
    if questions is not None and any(count < 1 for count in questions):
        raise ValueError(f"questions={list(questions)}; each prefix needs at least one")
    if room < 1:
        raise ValueError(f"behind the prefix there is room for {room} tokens; at least 1 is needed")
    sequence = with_embeds(without_texts(sequence.relayout("left")), plan)
    depth = sharable_layers(decoder, plan, layout.width + room)
    stages = plan.schedule(sequence.layout, len(decoder.layers))
    cache = StagedCache(decoder.config)
    cut = _cut_at(plan, depth)
    looks_back = cut is not None and any(signal.offset == -1 for signal in cut.reducer.signals)
    record = Record(watch=depth - 1 if looks_back else None)
    behind, _ = decoder.run_stages(sequence, stages, range(depth), plan, cache, record, {})
    opened = [stage for stage in stages if stage.start < min(stage.stop, depth)]
    return Prefix(
        plan=plan,
        depth=depth,
        questions=None if questions is None else tuple(questions),
        room=room,
        uncut=sequence.layout,
        layouts=tuple(stage.layout for stage in opened),
        sequence=behind,
        before=record.watched,
        cache=cache,
    )


def needs_whole_prompts(plan: ReductionPlan) -> str | None:
    """Why a plan cannot start from a prefix; None when it can."""
    if plan.texts:
        return "compares with texts of the question"
    if plan.rerank:
        return "runs the whole prompt at every token"
    return None


def sharable_layers(decoder: Any, plan: ReductionPlan, width: int) -> int:
    """Layers that questions of one picture can share when prompts have up to `width` tokens."""
    depth = plan.shared_depth(len(decoder.layers))
    depth = min([depth, *(cut.at for cut in plan.cuts if not counts_known(cut.reducer))])
    config = decoder.config
    for index in range(depth):
        # A full window layer would have dropped the columns that `relay` needs.
        if attention_kind(config, index) == SLIDING and config.sliding_window <= width:
            return index
    return depth


def without_texts(sequence: TokenSequence) -> TokenSequence:
    """Without the texts beside the prompt: those of a prefix say nothing about its questions."""
    inputs = {"seed": sequence.inputs["seed"]}
    return replace(sequence, inputs=inputs, layout=replace(sequence.layout, texts=()))


def _cut_at(plan: ReductionPlan, layer: int) -> Cut | None:
    return next((cut for cut in plan.cuts if cut.at == layer), None)
