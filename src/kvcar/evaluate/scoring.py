"""Log-likelihoods of continuations, stepped through a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..models.structure import cache_argument, find_decoder

Text = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of its continuation."""


@dataclass(frozen=True)
class Scored:
    """One continuation.

    Attributes:
        log_likelihood: of all its tokens, in nats.
        greedy: every one of its tokens was the likeliest.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """Scores continuations of token ids, a few tokens at a time, so that each reads what a cache made of those before.

    Texts that begin alike share a row of the cache until they part: choices after the same question cost it once.

    Args:
        model: a causal language model, attached if the caches are kvcar's.
        new_cache: makes an empty cache.
        step_tokens: tokens fed at once, which see each other exactly.
    """

    def __init__(self, model: PreTrainedModel, new_cache: Callable[[], Cache], step_tokens: int) -> None:
        self._model, self._new_cache, self._step_tokens = model, new_cache, step_tokens
        parts = find_decoder(model)
        self._decoder: nn.Module = parts.decoder
        self._device = parts.device

    @torch.no_grad()
    def score(self, texts: Sequence[Text]) -> list[Scored]:
        """Run ``texts`` as one batch.

        Args:
            texts: context and continuation, at least one token each.
        """
        ids, targets = (x.to(self._device) for x in _laid_out(texts))
        total = torch.zeros(len(texts), device=self._device, dtype=torch.float32)
        greedy = torch.ones(len(texts), dtype=torch.bool, device=self._device)
        cache = self._new_cache()
        rows = _Rows([len(context) + len(continuation) - 1 for context, continuation in texts])
        for start in range(0, ids.shape[1], self._step_tokens):
            span = slice(start, start + self._step_tokens)
            moved = rows.step(start, ids[:, span].tolist())
            if moved is not None:
                cache.batch_select_indices(torch.tensor(moved, device=self._device))
            places = (rows.texts, rows.row_of_text, rows.text_of_row)
            alive, row, one_text = (torch.tensor(x, device=self._device) for x in places)
            given = {"input_ids": ids[one_text, span], "use_cache": True} | cache_argument(self._model, cache)
            wanted = targets[alive, span]
            asked = wanted >= 0
            if not asked.any():
                # Nobody asks what follows, and the head costs as much as several layers.
                self._decoder(**given)
                continue
            log_probs = torch.log_softmax(self._model(**given).logits.float(), dim=-1)
            place = torch.arange(wanted.shape[1], device=self._device)
            found = log_probs[row[:, None], place, wanted.clamp_min(0)]
            total[alive] += (found * asked).sum(1)
            greedy[alive] &= ((log_probs.argmax(-1)[row] == wanted) | ~asked).all(1)
        return [Scored(*each) for each in zip(total.tolist(), greedy.tolist(), strict=True)]


class _Rows:
    """Which row of the cache each text is in, as texts part and end.

    Args:
        lengths: tokens of each text that are fed.

    Attributes:
        texts: those that have not ended.
        text_of_row: one of the texts in each row.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._row = [0] * len(lengths)
        self.texts: list[int] = []
        self.text_of_row: list[int] = []

    @property
    def row_of_text(self) -> list[int]:
        """The row of each text that has not ended."""
        return [self._row[text] for text in self.texts]

    def step(self, start: int, tokens: Sequence[Sequence[int]]) -> list[int] | None:
        """Take in the next tokens of all texts; say which old row each new one continues, None where nothing changes."""
        before = len(self.text_of_row)
        self.texts = [text for text, length in enumerate(self._lengths) if length > start]
        self.text_of_row = []
        nodes: dict[tuple[int, tuple[int, ...]], int] = {}
        for text in self.texts:
            node = (self._row[text], tuple(tokens[text]))
            if node not in nodes:
                nodes[node] = len(nodes)
                self.text_of_row.append(text)
            self._row[text] = nodes[node]
        parents = [parent for parent, _ in nodes]
        return None if start == 0 or parents == list(range(before)) else parents


def _laid_out(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Lay out ids ``[B, T]`` padded on the right, where padding reaches no token that is scored, and the token to be scored after
    each, -1 for none.
    """
    longest = max(len(context) + len(continuation) for context, continuation in texts) - 1
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    targets = torch.full((len(texts), longest), -1, dtype=torch.int64)
    for row, (context, continuation) in enumerate(texts):
        whole = torch.tensor([*context, *continuation])
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
    return ids, targets


def alike_together(texts: Sequence[Text]) -> list[int]:
    """Order texts so that those that begin alike are neighbours, and longer ones come first.

    What does not fit into memory fails at once then, and the rows of a batch end at about the same step. Texts begin alike
    if they follow each other and share half of the shorter one.
    """
    wholes = [[*context, *continuation] for context, continuation in texts]
    groups: list[list[int]] = []
    for index, whole in enumerate(wholes):
        last = wholes[index - 1]
        if groups and _shared(last, whole) * 2 >= min(len(last), len(whole)):
            groups[-1].append(index)
        else:
            groups.append([index])
    groups.sort(key=lambda group: -max(len(wholes[index]) for index in group))
    return [index for group in groups for index in group]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
