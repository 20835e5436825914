"""Taking turns: what slows a machine down for a while must meet all contenders alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def round_orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """Order of turns in each round.

    A shuffled order is rotated by one place a round and shuffled anew when it is back at its start: every contender
    comes first, second, ... equally often, and follows another one each time.
    """
    generator, order = random.Random(seed), list(names)
    for index in range(rounds):
        place = index % len(order)
        if place == 0:
            generator.shuffle(order)
        yield order[place:] + order[:place]


def in_rounds(
    turns: Mapping[str, Callable[[], T]], rounds: int, seed: int = 0, on_round: Callable[[int], None] | None = None
) -> dict[str, list[T]]:
    """Call every turn once a round; what each gave, round by round."""
    given: dict[str, list[T]] = {name: [] for name in turns}
    for number, order in enumerate(round_orders(list(turns), rounds, seed)):
        for name in order:
            given[name].append(turns[name]())
        if on_round is not None:
            on_round(number + 1)
    return given
