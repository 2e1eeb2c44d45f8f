"""Sampling whose draws belong to the question, not to the batch it stands in.

Special here: the Gumbel trick. ``argmax(logits / T + g)`` with Gumbel noise g is a draw from
``softmax(logits / T)`` (Gumbel 1954; Maddison et al., arXiv 1411.0030, section 2), and here g is a
hash of (seed of the question, step, token). So a question gets the same answer alone, in a batch,
after a restart and on any process, and decoding stays a plain greedy search.

    sampler = SeededSampling([question_seed(0, uid) for uid in uids], temperature=0.2, top_p=0.9)
    model.generate(..., do_sample=False, logits_processor=LogitsProcessorList([sampler]))
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from llava.reduction.baselines import hash_uniform


def question_seed(seed: int, uid: str) -> int:
    """The seed of one question, below 2**31."""
    return zlib.crc32(f"{seed} {uid}".encode()) & 0x7FFFFFFF


class SeededSampling(LogitsProcessor):
    """Turns greedy search into sampling. seeds: one a row. One object serves one `generate`."""

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float | None = None
    ) -> None:
        self.seeds = torch.tensor(list(seeds))
        self.temperature = temperature
        self.top_p = TopPLogitsWarper(top_p) if top_p is not None and top_p < 1 else None
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose argmax is the draw."""
        logits = scores.float() / self.temperature
        if self.top_p is not None:
            logits = self.top_p(input_ids, logits)
        self.seeds = self.seeds.to(scores.device)
        words = scores.shape[1]
        first = self.step * words
        index = torch.arange(first, first + words, device=scores.device)
        drawn = hash_uniform(self.seeds, index.expand(scores.shape))
        self.step += 1
        return logits - torch.log(-torch.log(drawn.double().clamp(1e-9, 1 - 1e-9))).float()
