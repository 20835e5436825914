"""Contenders over one text, from context length to context length, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from kvcar.errors import InputError

from .rounds import in_rounds, round_orders
from .runners import FULL, STATIC, Runner, static_copy

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """How much is timed.

    Attributes:
        rounds: in which everyone has a turn, at each context length.
        steps: decode steps of a turn.
        chunk: most tokens of a prompt that are fed at once.
        seed: of the order of turns.
    """

    rounds: int
    steps: int
    chunk: int
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are decoded at each context length."""
        return self.rounds * self.steps


@dataclass(frozen=True)
class Timings:
    """Of one context length.

    Attributes:
        context: tokens held before the first step.
        step_seconds: by contender, of every step of every round.
        held_bytes: by contender, before the first step.
    """

    context: int
    step_seconds: dict[str, list[list[float]]]
    held_bytes: dict[str, int]


def check_contexts(contexts: Sequence[int], pace: Pace, max_positions: int) -> None:
    """Refuse context lengths that one growing cache cannot pass through; raises InputError."""
    for shorter, longer in pairwise(contexts):
        if longer - shorter < pace.tokens:
            raise InputError(
                f"contexts must rise by at least the {pace.tokens} tokens that are decoded at each, got {shorter} and "
                f"{longer}; take fewer --rounds or --steps, or contexts further apart"
            )
    if not contexts or contexts[0] < 1:
        raise InputError("contexts must be positive")
    if contexts[-1] + pace.tokens > max_positions:
        raise InputError(
            f"{contexts[-1]} tokens and {pace.tokens} decoded ones go beyond the model's {max_positions} positions"
        )


def grow(runners: Sequence[Runner], ids: Tensor, context: int, pace: Pace) -> list[tuple[int, int]]:
    """Feed the prompt up to ``context``, chunk by chunk, in turn; first token and number of tokens of each chunk."""
    by_name, chunks, start = {runner.name: runner for runner in runners}, [], runners[0].fed
    orders = round_orders(list(by_name), -(-(context - start) // pace.chunk), pace.seed + context)
    for order in orders:
        stop = min(start + pace.chunk, context)
        for name in order:
            by_name[name].prefill(ids[:, start:stop])
        chunks.append((start, stop - start))
        start = stop
    return chunks


def time_steps(runners: Sequence[Runner], ids: Tensor, pace: Pace, static: bool, tell: Tell) -> Timings:
    """Decode on from where the runners are; they grow by the tokens that are decoded, the same for all.

    A static cache is filled anew from the full one at each length: it attends over all the room that it has.
    """
    taking = list(runners)
    full = next(runner for runner in runners if runner.name == FULL)
    context = full.fed
    if static:
        copied = static_copy(full.cache, full.model.config, pace.tokens)
        taking.append(Runner(STATIC, "full", full.model, lambda: copied, fed=context))
    held = {runner.name: runner.held_bytes for runner in taking}
    turns = {runner.name: _turn(runner, ids, pace.steps) for runner in taking}
    seconds = in_rounds(
        turns, pace.rounds, pace.seed + context, lambda n: tell(f"context {context}, round {n} of {pace.rounds}")
    )
    return Timings(context, seconds, held)


def _turn(runner: Runner, ids: Tensor, steps: int) -> Callable[[], list[float]]:
    return lambda: runner.decode(ids[:, runner.fed : runner.fed + steps])
