"""Plots as SVG text, for pages and files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle.summary import LayerBits
from ..geometry import Slot

_KEY_COLOUR, _VALUE_COLOUR = "#2f6f9f", "#d08a2e"
_MARKERS = "os^DvP*X<>"
_TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Point:
    """A cache in the plane of size and quality."""

    name: str
    times_smaller: float
    kl_divergence: float
    kl_stderr: float


def quality_against_size(points: Sequence[Point]) -> str:
    """Plot KL divergence (log scale) against times smaller, with error bars."""
    figure, axes = _figure(6.4, 3.8)
    for point in points:
        axes.errorbar(
            point.times_smaller, point.kl_divergence, yerr=point.kl_stderr, marker="o", capsize=3, color=_KEY_COLOUR
        )
        axes.annotate(
            point.name,
            (point.times_smaller, point.kl_divergence),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
        )
    if any(point.kl_divergence > 0 for point in points):
        axes.set_yscale("log")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("times smaller than the full bfloat16 cache, all bytes counted")
    axes.set_ylabel("KL divergence from the full cache\n(nats per token)")
    axes.grid(alpha=0.3)
    return _svg(figure)


def frontier(series: Mapping[str, Sequence[Point]], noise_floor: float | None = None) -> str:
    """Plot KL divergence (log scale) against times smaller (log scale), a line with error bars for each family of caches.

    Args:
        series: points by family, of any order.
        noise_floor: divergence of a lossless cache; named in the axis' label, since it lies far below all others.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = _figure(8.0, 5.0)
    for index, (family, points) in enumerate(series.items()):
        shown = sorted((p for p in points if p.kl_divergence > 0), key=lambda p: p.times_smaller)
        axes.errorbar(
            [p.times_smaller for p in shown],
            [p.kl_divergence for p in shown],
            yerr=[p.kl_stderr for p in shown],
            marker=_MARKERS[index % len(_MARKERS)],
            color=f"C{index % 10}",
            capsize=3,
            linewidth=1,
            label=family,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=_TICKS, numticks=40))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("times smaller than the full bfloat16 cache, all bytes counted")
    floor = "" if noise_floor is None else f"\nnoise floor (lossless cache): {noise_floor:.1e}"
    axes.set_ylabel(f"KL divergence from the full cache (nats per token){floor}")
    axes.grid(alpha=0.3, which="both")
    if series:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def bits_per_layer(layers: Sequence[LayerBits], title: str) -> str:
    """Plot average stored bits per element of every layer, keys and values side by side."""
    figure, axes = _figure(6.4, 2.8)
    places = [layer.layer for layer in layers]
    axes.bar([p - 0.2 for p in places], [layer.key for layer in layers], width=0.4, label="keys", color=_KEY_COLOUR)
    axes.bar(
        [p + 0.2 for p in places], [layer.value for layer in layers], width=0.4, label="values", color=_VALUE_COLOUR
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("stored bits per element")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.16))
    axes.grid(axis="y", alpha=0.3)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object interface: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """Write the figure as an ``<svg>`` element without XML prologue."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvcar", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def reuse_costs(costs: Mapping[Slot, float], measure: str) -> str:
    """Plot a heat map of what each slot's reuse of the layer below costs: a row for each layer, keys left, values right."""
    figure, _ = _figure(6.4, 0.16 * len({slot.layer for slot in costs}) + 1.4)
    figure.clear()
    panels = figure.subplots(1, 2, sharey=True)
    highest = max(costs.values(), default=1.0)
    image = None
    for axes, kind in zip(panels, ("key", "value"), strict=True):
        own = [slot for slot in costs if slot.kind == kind]
        layers = sorted({slot.layer for slot in own})
        heads = sorted({slot.head for slot in own})
        grid = [[float("nan")] * len(heads) for _ in layers]
        for slot in own:
            grid[layers.index(slot.layer)][heads.index(slot.head)] = costs[slot]
        image = axes.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=highest, cmap="viridis")
        axes.set_xticks(range(len(heads)), [str(head) for head in heads])
        every = max(1, len(layers) // 12)
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set_xlabel("KV head")
        axes.set_title(f"{kind}s", fontsize=10)
    panels[0].set_ylabel("layer, against the one below")
    figure.colorbar(image, ax=list(panels), label=measure)
    return _svg(figure)
