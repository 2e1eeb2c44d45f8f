"""The path that PyramidDrop's README names. The loop and the cut live in `staged_decoder`."""

from llava.model.staged_decoder import StagedModelMixin

pdrop_forward = StagedModelMixin.pdrop_forward
pdrop_rank_drop = StagedModelMixin.pdrop_rank_drop

__all__ = ["pdrop_forward", "pdrop_rank_drop"]
