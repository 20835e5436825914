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

PASSAGE_TOKENS = 256
_OTHER_KIND = 7  # openings further on: what follows an end is of another kind

# Written for this purpose; each is continued by the model. Of those that begin with CHAT the rest is a user's turn.
CHAT = "chat: "
OPENINGS = (
    "The old bridge across the river was closed in the spring, and people from both villages",
    'def merge_intervals(intervals):\n    """Join the intervals that overlap."""\n',
    "Margaret Ellis (born 12 May 1871) was a painter and teacher whose early work",
    CHAT + "A train leaves at 14:20 and arrives at 17:05. How long does it take? Explain step by step.",
    '{"orders": [{"id": 1041, "customer": "A. Novak", "items": [{"sku": "K-220", "count": 3, "price": 12.5}',
    "Our shop opened in 2009 with a simple idea: to make",
    "Der Vertrag wurde am Montag unterzeichnet. Nach Angaben der Stadt sollen die Arbeiten",
    "2024-03-11 08:14:02,117 INFO  [worker-3] request id=9f31 path=/api/items status=200 ms=41\n2024-03-11 08:14:02,",
    "The regiment landed on the island in August and was ordered to",
    "La reunión empezó con retraso porque algunos de los invitados",
    "17 + 28 = 45\n36 + 49 = 85\n128 - 59 = 69\n12 * 11 = ",
    "Hi everyone, I have a question about my washing machine. Since last week it",
    "#include <stdio.h>\n#include <stdlib.h>\n\nstatic int compare(const void *a, const void *b)\n{\n",
    CHAT + "Write a short letter to a neighbour about the noise at night.",
    "Researchers have found that birds which live near busy roads",
    "| city | inhabitants | area in km2 |\n|---|---|---|\n| Graz | 291,000 | 127.6 |\n| Brno |",
    "中国的城市在过去二十年里发生了很大的变化，许多人",
    "I bought this tent for a trip with my two sons and",
    "okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay",
    "<html>\n<head><title>Opening hours</title></head>\n<body>\n<ul>\n<li>Monday: ",
    "The second album by the band was recorded in",
    "SELECT customer.name, COUNT(*) AS orders\nFROM customer\nJOIN",
    "Shopping list:\n- two lemons\n- flour\n- ",
    "Police said on Thursday that a man had been",
    "In this paper we study the stability of solutions of the equation under small changes of",
    CHAT + "What is the difference between a list and a tuple in Python? Give an example.",
    "To change the settings of your account, first open",
    "import { useState } from 'react';\n\nexport function Counter({ start = 0 }) {\n",
    "Le conseil municipal a décidé hier soir de",
    "Heavy rain fell over the coast as the storm moved north, and by the evening of",
    "hahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahaha",
    "3.14159 2.71828 1.41421 0.57721 1.61803 31 41 59 26 53 58 97 93 23 84 62 64 33 83 27 95 02 88 41 97 16 93 99 37 51",
    "The species is found in dry forests of southern",
    "https://example.org/docs/index.html?page=2&sort=name\nhttps://example.org/img/logo.png\nhttps://",
    "#!/bin/sh\nset -e\nfor file in *.tar.gz; do\n",
    "In the third quarter the company's revenue rose by",
    "aGVsbG8gd29ybGQgdGhpcyBpcyBhIHRlc3Qgb2YgYmFzZTY0IHRleHQ=\nU29tZSBtb3JlIGxpbmVz",
    "😀 😃 😄 😁 😆 😅 😂 🙂 🙃 😉 😊 😇 😍 😘 😋 😎",
    "Thank you for your interest in our summer school. This year",
    "Chapter 1\n\nIt was late when Anna heard the door. She put down the book and",
    CHAT + "Fasse in drei Sätzen zusammen, warum es im Herbst kälter wird.",
    "She had not seen her brother since the war, and when the letter came she",
    "The committee met on 4 June. Present: Ms Okafor (chair), Mr Lindqvist, Dr Rao. Apologies:",
    "x\n\n\n\n    \n\n\t\t\n        y\n\n\n\n        z\n\n",
    "The game was released in Japan in",
    "Once the dough has rested, heat the oven to 220 degrees and",
    'Traceback (most recent call last):\n  File "app.py", line 31, in <module>\n    main()\n  File',
    "If you are looking for a quiet place to stay near the lake,",
    "Die Bahnstrecke wurde 1898 eröffnet und verbindet seitdem",
    "Mit dem Befehl können Dateien kopiert werden. Folgende Optionen stehen zur Verfügung:\n\n-a, --alles\n    ",
    "Le musée, ouvert en 1934, présente",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\nimport os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "El río nace en las montañas y",
)


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
    level = torch.rand(len(reached), 1, generator=generator) * reached[:, -1:]
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
