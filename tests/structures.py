"""Every structure a plan can have, and pages of random tokens for them: what attention kernels are tested over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bundles import by_hand, fitted
from tiny import tiny_model

from kvcar.bundle import Bundle
from kvcar.cache.coder import PageCoder
from kvcar.cache.pages import PageStore
from kvcar.geometry import Kind, Slot
from kvcar.kernels.attend import PagedPast
from kvcar.kernels.page_means import pack_means
from kvcar.kernels.rotary import RotaryTable
from kvcar.layout import MeansLayout
from kvcar.plan import Reuse

HEAD_DIM = 16


def slots(layers: Sequence[int], kind: Kind, heads: Sequence[int] = (0, 1)) -> tuple[Slot, ...]:
    """Slots of some heads in some layers."""
    return tuple(Slot(layer, head, kind) for layer in layers for head in heads)


MODEL = tiny_model("llama")
STRUCTURES: dict[str, Callable[[], Bundle]] = {
    "a block for each layer": lambda: by_hand(MODEL, [slots([i], k) for i in range(4) for k in ("key", "value")]),
    "blocks over layers": lambda: by_hand(MODEL, [slots(range(4), "key"), slots(range(4), "value")], bits=[7, 5, 3, 2]),
    "heads apart": lambda: by_hand(MODEL, [slots([i], k, [h]) for i in range(4) for k in ("key", "value") for h in (1, 0)]),
    "keys with values": lambda: by_hand(MODEL, [slots([i], "key") + slots([i], "value") for i in range(4)], bits=8),
    "raw latents": lambda: by_hand(MODEL, [slots(range(4), "key"), slots(range(4), "value")], bits=[16, 4]),
    "values exact": lambda: by_hand(MODEL, [slots(range(4), "key")]),
    "one key head exact": lambda: by_hand(MODEL, [slots(range(4), "key", [0]), slots(range(4), "value")]),
    "reuse": lambda: by_hand(
        MODEL,
        [slots([0, 2], "key"), slots([0, 2], "value")],
        reuses=tuple(Reuse(slot=Slot(i + 1, h, k), source=Slot(i, 1 - h, k)) for i in (0, 2) for h in (0, 1) for k in ("key", "value")),
    ),
    "autoencoder": lambda: fitted(MODEL, codec="autoencoder", times_smaller=3, steps=5),
    "decoders in 8 bits": lambda: fitted(MODEL, codec="linear8", metric="effect", times_smaller=3, layers_per_block=2),
    "means of pages": lambda: fitted(MODEL, codec="linear8", metric="effect", times_smaller=3, layers_per_block=2, page_means=True),
    "half steps": lambda: fitted(MODEL, codec="linear8", metric="effect", times_smaller=5, layers_per_block=2, page_means=True, trellis=True),
    "lossless": lambda: fitted(MODEL, codec="identity"),
    "plain quantiser": lambda: fitted(MODEL, codec="identity", bits=4.5),
}  # fmt: skip


def paged_past(
    coder: PageCoder,
    layer: int,
    tokens: int,
    batch: int,
    rotary: RotaryTable | None,
    padding: list[int],
    head_dim: int = HEAD_DIM,
) -> PagedPast:
    """Pages of random tokens on the coder's device; the first 4 tokens after the padding are not attended (sinks)."""
    generator = torch.Generator().manual_seed(tokens)
    store = PageStore(coder.units, coder.layouts[0].page_bytes, coder.plan.page_tokens)

    def fetch(slot, before_rope):
        del slot, before_rope
        return torch.randn(batch, tokens, head_dim, generator=generator).to(coder.device)

    store.append([unit.stored(unit.vectors(fetch)) for unit in coder.units])
    for unit in coder.units:
        if unit.unit.means is not None:
            _write_means(store, unit.unit.means, generator)
    offset = torch.tensor(padding, device=coder.device)
    return PagedPast(
        store.arenas, tokens, offset + 4, max(padding) + 4, offset,
        coder.readers(layer, "key"), coder.readers(layer, "value"), rotary,
    )  # fmt: skip


def _write_means(store: PageStore, place: MeansLayout, generator: torch.Generator) -> None:
    """Random means, as large as what they are added to."""
    for arena in store.arenas:
        means = torch.randn(*arena.shape[:2], place.width, generator=generator)
        arena[..., place.offset : place.end] = pack_means(means).to(arena.device)


def rotary(device: str | torch.device = "cpu") -> RotaryTable:
    """Rotation of the whole head, as Llama's."""
    exponent = torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=device) / (HEAD_DIM // 2)
    return RotaryTable(1.0 / 10000**exponent, 1.0, "half")
