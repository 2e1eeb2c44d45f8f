"""The token sequence: everything that belongs to a token moves together."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, labels_of, prompts, tiny_model

from llava.reduction import Cut, ReductionPlan, Selection, Uniform
from llava.sequence import Group, Layout


def test_layout_arithmetic():
    groups = (Group(0, 0, 4, 4), Group(0, 1, 2, 2), Group(1, 0, 3, 3))
    layout = Layout((9, 5), groups, (1, 1), "left")
    assert layout.bounds() == ((0, 9), (4, 5))
    assert layout.visual == (6, 3)
    assert layout.after([1, 2, 0]).lengths == (6, 2)
    assert layout.slots().tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1]]
    packed = Layout((9, 5), groups, (1, 1), "packed")
    assert packed.bounds() == ((0, 9), (9, 5))
    assert (packed.rows, packed.width, packed.is_padded) == (1, 14, False)
    twice = layout.take([0, 0, 1, 1])
    assert [group.sample for group in twice.groups] == [0, 0, 1, 1, 2, 3]
    assert twice.lengths == (9, 9, 5, 5)
    with pytest.raises(ValueError, match="left, right, packed"):
        Layout((3,), (), (1,), "top")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["left", "right", "packed"])
def test_what_is_kept_is_what_was_there(kind):
    """After cuts every row still has its own embedding, target and cell; order and text stay."""
    model = tiny_model()
    inputs = batch(prompts())
    before = model.build_sequence(**inputs, labels=labels_of(inputs), kind=kind)
    plan = ReductionPlan((Cut(0, Uniform(0.4)),), positions="original")
    # Layers that do nothing leave the embeddings as they are.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        after = model(sequence=before, reduction=plan, return_trace=True).sequence
    for sample in range(len(prompts())):
        old, new = rows_of(before, sample), rows_of(after, sample)
        origins = new[1][:, 1].tolist()
        assert origins == sorted(origins)
        torch.testing.assert_close(new[0], old[0][origins])
        assert torch.equal(new[1][:, :4], old[1][origins][:, :4])
        assert torch.equal(new[1][:, 5:], old[1][origins][:, 5:])
        text = [i for i, row in enumerate(old[1].tolist()) if row[4] < 0]
        assert set(text) <= set(origins)


def rows_of(sequence, sample):
    layout = sequence.layout
    start, length = layout.bounds()[sample]
    row = 0 if layout.kind == "packed" else sample
    return sequence.hidden[row, start : start + length], sequence.facts[row, start : start + length]


def test_padding_is_neutral_after_a_cut():
    model = tiny_model()
    sequence = model.build_sequence(**batch(prompts()), kind="left")
    out = model(sequence=sequence, reduction="uniform:layers=[2],ratios=[0.3]", return_trace=True)
    padding = out.sequence.origin < 0
    assert bool(padding.any())
    assert out.sequence.facts[padding].unique(dim=0).tolist() == [[0, -1, -100, 0, -1, -1, -1, -1]]


def test_the_callers_sequence_is_not_changed():
    model = tiny_model()
    sequence = model.build_sequence(**batch(prompts()))
    hidden, facts = sequence.hidden.clone(), sequence.facts.clone()
    for _ in range(2):
        model(sequence=sequence, reduction="pyramiddrop:layers=[1,2],ratios=[0.5,0.2]")
    assert torch.equal(sequence.hidden, hidden)
    assert torch.equal(sequence.facts, facts)


def test_a_merging_method_replaces_kept_rows():
    """Kept tokens become ``mix @ tokens``; here the mean of their group."""

    class Mean(Uniform):
        def select(self, view):
            share = view.valid.float() / view.count[:, None]
            mix = share[:, None].expand(-1, share.shape[1], -1)
            return Selection(keep=super().select(view).keep, mix=mix)

    model = tiny_model()
    sequence = model.build_sequence(**batch(prompts()[:1]))
    visual = sequence.cell[0, :, 0] >= 0
    mean = sequence.hidden[0, visual].mean(0)
    seen = {}
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.setdefault("hidden", args[0])
    )
    out = model(
        sequence=sequence, reduction=ReductionPlan((Cut(0, Mean(0.25)),)), return_trace=True
    )
    hook.remove()
    kept = out.sequence.cell[0, :, 0] >= 0
    assert int(kept.sum()) == 4
    torch.testing.assert_close(seen["hidden"][0, kept], mean.expand(4, -1))


def test_packed_sequences_are_not_for_beams_or_caches():
    model = tiny_model()
    packed = model.build_sequence(**batch(prompts()), kind="packed")
    with pytest.raises(ValueError, match="beams"):
        packed.repeat_interleave(2)
    with pytest.raises(ValueError, match="cache"):
        model(sequence=packed, use_cache=True)
    model.set_attn_implementation("eager")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        model(sequence=packed, use_cache=False)
