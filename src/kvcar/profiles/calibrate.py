"""What the errors of given codecs really cost, layer by layer, against what the effect metric expects of them.

The metric is a mean over tokens, so it expects errors as large at the tokens that matter as at the others. Where few tokens
carry most of the attention that is wrong by far: errors in the keys of some layers of the demo model cost ten times what
it says. The ratio is measured once codecs exist, and bits are then shared out anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..fit.effect import EffectProbe
from ..plan import Plan, step_tokens
from ..processes import own_share, total
from ..progress import OnProgress, counter
from ..shapes import Kind, Slot
from ..train.two_pass import Code, TwoPass
from .statistics import Side

_LEAST, _MOST = 0.25, 16.0
"""Ratios are kept within these: a few thousand gradients of heavy tails do not tell more."""


class _Costs:
    """Sums over tokens of what errors cost and of what they would if they did not depend on the gradients."""

    def __init__(self) -> None:
        self.actual: dict[Side, Tensor] = {}
        self._errors: dict[Side, Tensor] = {}
        self._gradients: dict[Side, Tensor] = {}
        self.tokens = 0

    def add(self, side: Side, errors: Tensor, gradients: Tensor) -> None:
        """Take in a side's errors and gradients ``[T, W]`` of one window."""
        for sums, value in (
            (self.actual, (errors * gradients).sum(1).square().sum()),
            (self._errors, errors.T @ errors),
            (self._gradients, gradients.T @ gradients),
        ):
            sums[side] = sums.get(side, 0) + value.double().cpu()

    def ratios(self) -> dict[Side, float]:
        """Of all processes together."""
        tokens = int(total(torch.tensor(self.tokens)))
        found = {}
        for side in sorted(self.actual):
            errors, gradients = total(self._errors[side]), total(self._gradients[side])
            expected = float((errors * gradients).sum()) / tokens
            actual = float(total(self.actual[side]))
            # A side without errors says nothing.
            found[side] = min(max(actual / expected, _LEAST), _MOST) if expected else 1.0
        return found


def cost_ratios(
    model: PreTrainedModel,
    plan: Plan,
    codes: Mapping[int, Code],
    windows: Tensor,
    window: int,
    seed: int,
    on_progress: OnProgress,
) -> dict[Side, float]:
    """(layer, kind) -> cost of these errors over what the metric expects, between 1/4 and 16.

    Args:
        model: as ``collect_statistics`` takes it.
        plan: which slots the codes are of.
        codes: what is done to the vectors of each block of the plan.
        windows: token ids int64 ``[N, T]`` to measure on.
        window: recent tokens read exactly.
        seed: of the tokens drawn.
        on_progress: told what is going on.
    """
    step = step_tokens(plan.page_tokens, plan.window)
    passes = TwoPass(model, plan, step, window)
    probe = EffectProbe(model, plan.geometry, plan.sinks, step, window, seed)
    costs, own = _Costs(), own_share(windows)
    count = counter(on_progress, "compare errors with what they cost", own.shape[0] * (own.shape[1] - plan.sinks))
    count(0)
    for ids in own:
        errors = _errors(passes, plan, ids, codes)

        def hear(layer: int, kind: Kind, gradients: Tensor, errors: Mapping[Side, Tensor] = errors) -> None:
            if (layer, kind) in errors:  # others stay exact
                costs.add((layer, kind), errors[layer, kind], gradients)

        for tokens in probe.run(ids[None], hear):
            costs.tokens += tokens
            count(tokens)
    return costs.ratios()


@torch.no_grad()
def _errors(passes: TwoPass, plan: Plan, ids: Tensor, codes: Mapping[int, Code]) -> dict[Side, Tensor]:
    """(layer, kind) -> errors float32 ``[tokens, H * D]`` of a window's vectors, sinks left out."""
    parts: dict[Slot, Tensor] = {}
    with passes:
        prefilled = passes.prefill(ids)
        for index, code in codes.items():
            x = passes.block_vectors(prefilled, index)[plan.sinks :]
            split = (code(x) - x).split(plan.geometry.head_dim, dim=-1)
            parts |= zip(plan.blocks[index].slots, split, strict=True)
    heads = range(plan.geometry.kv_heads)
    sides = dict.fromkeys((slot.layer, slot.kind) for slot in parts)
    return {(layer, kind): torch.cat([parts[Slot(layer, h, kind)] for h in heads], -1) for layer, kind in sides}
