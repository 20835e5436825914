"""Text that a model writes itself, drawn at temperature 1 from openings of many kinds: what a fit needs to have seen, for any model.

A codec that was fitted on one kind of text costs several times as much on others. Samples need no corpus, are in the model's own
words and languages, and hold what nobody would put in one: repetition, digits, white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..models.structure import cache_argument
from ..models.weights import device_of
from ..progress import OnProgress, counter, silent
from .openings import CHAT, OPENINGS

PASSAGE_TOKENS = 256
_OTHER_KIND = 7  # openings further on: what follows an end is of another kind


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    windows: int,
    context: int,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> Tensor:
    """Draw windows of token ids int64 ``[windows, context]``, passages of ``PASSAGE_TOKENS`` tokens one after the other.

    Args:
        model: a causal language model; only run.
        tokenizer: its tokenizer; openings that are a user's turn take its chat template where it has one.
        windows: how many.
        context: tokens of each.
        seed: of the draws.
        on_progress: called with what is going on.
    """
    length = min(PASSAGE_TOKENS, context)
    passages = -(-windows * context // length)
    openings = [_tokens(tokenizer, opening) for opening in OPENINGS]
    rows = [_Row(openings, first) for first in range(passages)]
    ids = torch.empty(passages, length, dtype=torch.int64)
    generator, count = torch.Generator().manual_seed(seed), counter(on_progress, "write samples", length)
    cache, drawn, ends = _roomy_cache(model, length), [0] * passages, _ends(model, tokenizer)
    for place in range(length):
        ids[:, place] = torch.tensor([row.next(token, ends) for row, token in zip(rows, drawn, strict=True)])
        given = ids[:, place : place + 1].to(device_of(model))
        logits = model(input_ids=given, use_cache=True, **cache_argument(model, cache)).logits[:, -1]
        drawn = _drawn(logits, generator)
        count(1)
    # Neighbouring passages are of neighbouring openings, so that a window is of several kinds.
    return ids.flatten()[: windows * context].view(windows, context)


def _drawn(logits: Tensor, generator: torch.Generator) -> list[int]:
    """Draw a token from each row of logits ``[B, V]``, on the CPU, so that a seed gives the same on every device."""
    # One uniform number a row; ``multinomial`` takes one for each of the vocabulary.
    reached = torch.softmax(logits.float().cpu(), -1).cumsum(-1)
    level = torch.rand(len(reached), 1, generator=generator, dtype=torch.float32) * reached[:, -1:]
    return torch.searchsorted(reached, level, right=True)[:, 0].clamp_max(logits.shape[-1] - 1).tolist()


def _roomy_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """The model's cache with room for ``tokens``, so that a step does not copy all that came before."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values that are written into room made at once."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._tokens, self._used = tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B, H, T, D]`` and return all of them."""
        del args, kwargs
        if self._room is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = (x.new_empty(*x.shape[:2], self._tokens, x.shape[3]) for x in (key_states, value_states))
            self._room = keys, values
        start, self._used = self._used, self._used + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : self._used] = new
        self.keys, self.values = (room[:, :, : self._used] for room in self._room)
        return self.keys, self.values


class _Row:
    """One passage: an opening, what is drawn after it, and where that ends another opening."""

    def __init__(self, openings: Sequence[list[int]], first: int) -> None:
        self._openings = openings
        self._place = first
        self._given = iter(openings[first % len(openings)])

    def next(self, drawn: int, ends: set[int]) -> int:
        """The token that follows, where ``drawn`` is what the model would say."""
        token = next(self._given, None)
        if token is not None:
            return token
        if drawn in ends:
            self._place += _OTHER_KIND
            self._given = iter(self._openings[self._place % len(self._openings)])
        return drawn


def _tokens(tokenizer: Any, opening: str) -> list[int]:
    """Tokens of an opening, at least one."""
    if opening.startswith(CHAT) and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": opening.removeprefix(CHAT)}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(opening.removeprefix(CHAT))["input_ids"] or [0]


def _ends(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens after which a text is over."""
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in (*several, getattr(tokenizer, "eos_token_id", None)) if token is not None}
