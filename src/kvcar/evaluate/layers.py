"""Which layers cost most on a text: what the errors of each block cost, by the metric that its codec was fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import Attachment, attach, attachment_of
from ..cache.coder import UnitCoder
from ..errors import InputError
from ..geometry import Slot
from ..models.structure import model_of
from ..models.weights import device_of


@dataclass(frozen=True)
class BlockCost:
    """What the codes of one block cost on a text.

    Attributes:
        layers: of the block, rising.
        kinds: "key", "value" or both.
        nats: a token, expected from the errors of its vectors.
        share: of what all blocks cost, 0 to 1.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    nats: float
    share: float

    def __str__(self) -> str:
        """Name the block and its share in words."""
        first, last = self.layers[0], self.layers[-1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        kinds = "" if len(self.kinds) == 2 else f" ({self.kinds[0]}s)"
        return f"{where}{kinds} {100 * self.share:.0f} %"


@torch.no_grad()
def block_costs(model: PreTrainedModel, bundle: Bundle, token_ids: Tensor) -> list[BlockCost]:
    """Find what each block costs on a text, dearest first; nothing where the codecs do not know what their errors cost.

    Keys and values are those of one pass with the model's own cache.

    Args:
        model: that the bundle was fitted for, attached or not.
        bundle: its blocks are judged.
        token_ids: int64 ``[B, T]``, at least a page.

    Raises:
        InputError: fewer tokens than a page has.
    """
    model = model_of(model, "block_costs")
    page = bundle.plan.page_tokens
    tokens = token_ids.shape[1] // page * page
    if tokens == 0:
        raise InputError(f"what a page costs needs {page} tokens at least, got {token_ids.shape[1]}")
    attached = attachment_of(model)
    if attached is None:
        with attach(model, bundle) as attached:
            return block_costs(model, bundle, token_ids)
    own = DynamicCache(config=model.config)
    model(input_ids=token_ids[:, :tokens].to(device_of(model)), past_key_values=own, use_cache=True)
    units = [unit for unit in attached.coder(bundle).units if unit.knows_cost]
    nats = [_unit_cost(unit, attached, own, attached.coder(bundle).device) for unit in units]
    found = [
        BlockCost(
            tuple(sorted({slot.layer for slot in unit.unit.slots})),
            tuple(sorted({slot.kind for slot in unit.unit.slots})),
            cost,
            cost / max(sum(nats), 1e-30),
        )
        for unit, cost in zip(units, nats, strict=True)
    ]
    return sorted(found, key=lambda each: -each.nats)


def _unit_cost(unit: UnitCoder, attached: Attachment, own: DynamicCache, device: torch.device) -> float:
    """Nats a token, the mean over tokens of ``own`` that are no sinks; computed on ``device``, wherever layers lie."""

    def fetch(slot: Slot, before_rope: bool) -> Tensor:
        layer: Any = own.layers[slot.layer]
        side: Tensor = (layer.keys if slot.kind == "key" else layer.values).to(device)
        rotary = attached.rotary(slot.layer)
        if slot.kind == "key" and before_rope and rotary is not None:
            side = rotary.unrotate(side, torch.arange(side.shape[2], device=side.device).expand(side.shape[0], -1))
        return side[:, slot.head]

    x = unit.vectors(fetch).float()
    there = torch.arange(x.shape[1], device=x.device) >= attached.bundle.plan.sinks
    cost = unit.whole_pages(x, there.expand(x.shape[0], -1), with_cost=True).cost
    assert cost is not None
    return float(cost[:, there].mean())
