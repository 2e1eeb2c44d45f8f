"""Sampling by hash: right shares, and the same draw in any batch."""

from __future__ import annotations

import torch

from llava.eval.sampling import SeededSampling, question_seed


def draws(seeds, logits, steps=1, **options):
    """Tokens [steps, rows] drawn from the same logits at every step."""
    sampler = SeededSampling(seeds, **options)
    rows = logits.expand(len(seeds), -1)
    ids = torch.zeros(len(seeds), 1, dtype=torch.long)
    return torch.stack([sampler(ids, rows).argmax(1) for _ in range(steps)])


def test_shares_are_those_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    seeds = [question_seed(1, f"q:{i}") for i in range(4000)]
    for temperature in (1.0, 0.5):
        found = torch.bincount(
            draws(seeds, logits, 3, temperature=temperature).flatten(), minlength=5
        )
        expected = (logits / temperature).softmax(0)
        spread = (expected * (1 - expected) / 12000).sqrt()
        assert ((found / 12000 - expected).abs() < 4 * spread).all()


def test_top_p_leaves_the_tail_out():
    logits = torch.tensor([3.0, 2.0, 0.0, -1.0])
    found = draws(range(500), logits, 2, temperature=1.0, top_p=0.9)
    assert set(found.flatten().tolist()) == {0, 1}


def test_a_draw_belongs_to_question_and_step():
    logits = torch.zeros(50)
    seeds = [question_seed(0, uid) for uid in ("a", "b", "c")]
    together = draws(seeds, logits, 4, temperature=1.0)
    alone = draws(seeds[1:2], logits, 4, temperature=1.0)
    assert together[:, 1].tolist() == alone[:, 0].tolist()
    assert len(set(together.flatten().tolist())) > 6
    assert draws([question_seed(7, "a")], logits, 4, temperature=1.0).tolist() != (
        together[:, :1].tolist()
    )
