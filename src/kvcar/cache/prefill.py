"""Running a model over given tokens just for its cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..progress import OnProgress, counter, silent

PREFILL_CHUNK_TOKENS = 512


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    chunk: int = PREFILL_CHUNK_TOKENS,
    on_progress: OnProgress = silent,
) -> None:
    """Feed ``ids`` int64 ``[B, tokens]`` to ``model`` over ``cache``, ``chunk`` tokens at once; computes no logits but one."""
    count = counter(on_progress, "prefill", ids.shape[1])
    for part in ids.to(model.device).split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        count(part.shape[1])
