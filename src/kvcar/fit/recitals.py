"""Text whose second half can only be known by reading its first: what a fit must see so that a model still finds what lies far back.

Ordinary text and samples of the model say little of that: most of their tokens follow from the last few, so that a fit's metric gives
hardly any weight to the directions in which a model looks things up. Here random words, numbers and names are listed, and said again
in another order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..text import default_bos, evaluation_texts


class _Kind(NamedTuple):
    """How an item is listed, how it is said again, and how many neighbours are said at once."""

    listed: str
    recited: str
    together: int = 1


_KINDS = (
    _Kind(" {word},", " {word},", 12),
    _Kind("\n{word} = {number}", "\n{word} = {number}"),
    _Kind('\n    "{word}": "{code}",', '\nassert table["{word}"] == "{code}"'),
    _Kind("\n{name} {other} lives at {number} {street} Street.", "\nWhere does {name} {other} live? At {number} {street} Street."),
    _Kind("\n| {word} | {number} | {other} |", "\n| {word} | {number} | {other} |"),
)  # fmt: skip


def recital_windows(tokenizer: Any, windows: int, context: int, seed: int = 0) -> Tensor:
    """Write windows of token ids int64 ``[windows, context]``: lists of several kinds, and all of them recited.

    Args:
        tokenizer: the model's; a window begins as texts do with it.
        windows: how many.
        context: tokens of each.
        seed: of everything random.
    """
    draw, bos = random.Random(seed), default_bos(tokenizer)
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", evaluation_texts(None)[0].text)))
    rows = [bos + _window(tokenizer, draw, words, context - len(bos)) for _ in range(windows)]
    return torch.tensor(rows, dtype=torch.int64).view(windows, context)


def _window(tokenizer: Any, draw: random.Random, words: Sequence[str], tokens: int) -> list[int]:
    """Lists that take half of ``tokens``, then items of one after the other until they are full."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    kinds = draw.sample(_KINDS, len(_KINDS))
    ids: list[int] = []
    listed: list[list[dict[str, str]]] = []
    for number, _ in enumerate(kinds, 1):
        kind, items = kinds[number - 1], list[dict[str, str]]()
        while len(ids) < tokens * number // (2 * len(kinds)):
            items.append(_item(draw, words))
            ids += encode(kind.listed.format_map(items[-1]))
        listed.append(items)
    while len(ids) < tokens:
        for kind, items in zip(kinds, listed, strict=True):
            first = draw.randrange(max(1, len(items) - kind.together + 1))
            again = "".join(kind.recited.format_map(item) for item in items[first : first + kind.together])
            ids += encode(again if kind.together == 1 else f"\n{again}")
    return ids[:tokens]


def _item(draw: random.Random, words: Sequence[str]) -> dict[str, str]:
    word, other, name, street = (draw.choice(words) for _ in range(4))
    number, code = draw.randrange(10 ** draw.randint(2, 6)), draw.getrandbits(24)
    return {
        "word": word, "other": other.capitalize(), "name": name.capitalize(), "street": street.capitalize(),
        "number": str(number), "code": f"{code:06x}",
    }  # fmt: skip
