"""Codecs and memory of a fit at the width of an 8B model (8 KV heads of 128), with random weights at reduced depth.

python benchmarks/scale.py

A model of random weights has keys and values of nearly equal variance in all directions, which no trained model has, and how
many latents get bits depends on that. So the projections to keys and values get singular values that make variances fall as
those of the demo model's keys and values do (``SPECTRUM``); their directions stay random, and what errors cost is measured on
the random model. The record says how the variances that bits are shared by fell in the end, beside the demo model's.

Statistics take ``W**2 * 8`` bytes for every pair of sides that may share a block (``W = KV heads x head dim``; sides of one kind
less than ``band`` layers apart, keys and values less than ``shared_band``), and metrics ``layers * W**2 * 8`` each, so the whole model's follow from what is measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcar.record import Record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RESULTS = Path(__file__).parent / "results"
WIDTH, INTERMEDIATE, QUERY_HEADS, KV_HEADS, HEAD_DIM, FULL_LAYERS = 4096, 14336, 32, 8, 128, 32
_WEIGHT_BYTES = 2

PLACES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
"""Where along a falling spectrum its height is given, as a share of its length."""
SPECTRUM = {
    "key": (1.87, 0.95, 0.63, 0.26, -0.12, -0.53, -0.80, -1.03, -1.24, -1.49, -1.80, -2.60),
    "value": (1.39, 0.96, 0.78, 0.52, 0.25, -0.14, -0.36, -0.63, -0.81, -1.00, -1.24, -1.81),
    "both": (2.02, 1.03, 0.62, 0.30, -0.11, -0.50, -0.80, -1.12, -1.43, -1.78, -2.19, -3.09),
}
"""Of a layer's keys, values, and both together: log10 of variances under the effect metric over their mean. Medians of the
demo model's 30 layers (WikiText-2 and C4)."""


def statistics_bytes(layers: int, band: int, shared_band: int) -> int:
    """Bytes of the moments and metrics of a model of this width."""
    side = (KV_HEADS * HEAD_DIM) ** 2 * 8
    of_one_kind = 2 * sum(min(band, layers - first) for first in range(layers))
    of_both = sum(abs(i - j) < shared_band for i in range(layers) for j in range(layers))
    return (of_one_kind + of_both + 2 * layers) * side


def variances_of(heights: Sequence[float], count: int) -> torch.Tensor:
    """Fall through ``heights`` (log10, at ``PLACES``), straight in between: ``count`` variances, float32."""
    import torch

    at, found = torch.linspace(0, 1, count), torch.empty(count)
    for (a, b), (low, high) in zip(pairwise(PLACES), pairwise(heights), strict=True):
        own = (at >= a) & (at <= b)
        found[own] = low + (high - low) * (at[own] - a) / (b - a)
    return 10**found


def heights_of(spectra: Sequence[torch.Tensor]) -> list[float]:
    """Read falling variances at ``PLACES`` as log10 of their ratio to the mean: medians of all that are as long as the longest."""
    import torch

    longest = max(len(own) for own in spectra)
    at = (torch.tensor(PLACES) * (longest - 1)).round().long()
    rows = [(own / own.mean())[at].clamp_min(1e-12).log10() for own in spectra if len(own) == longest]
    return [round(float(height), 2) for height in torch.stack(rows).quantile(0.5, dim=0)]


def give_spectra(model: PreTrainedModel) -> None:
    """Replace projections to keys and values by random ones with singular values as in ``SPECTRUM``, as strong as before."""
    import torch

    for layer in model.model.layers:
        for name, projection in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            weight = projection.weight.data
            falling = variances_of(SPECTRUM[name], len(weight)).sqrt()
            left, right = (torch.linalg.qr(torch.randn(n, len(weight)))[0] for n in weight.shape)
            shaped = (left * falling) @ right.T
            weight.copy_(shaped * (weight.norm() / shaped.norm()))


def main(
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 3,
    profile: str = "balanced",
    size: Annotated[float, typer.Option(help="Times smaller.")] = 8.0,
    tokens: int = 6144,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Fit in a child process; record its codecs, and how far its memory rose above the model's."""
    if child:
        print(json.dumps(_fit(layers, profile, size, tokens)))
        return
    options = {"--layers": layers, "--profile": profile, "--size": size, "--tokens": tokens}
    command = [sys.executable, __file__, "--child", *(str(part) for option in options.items() for part in option)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = json.loads(printed.strip().splitlines()[-1])
    figures["statistics_bytes"] = statistics_bytes(layers, figures["band"], figures["shared_band"])
    figures["statistics_bytes_at_32_layers"] = statistics_bytes(FULL_LAYERS, figures["band"], figures["shared_band"])
    config = {
        "layers": layers, "profile": profile, "times_smaller": size, "tokens": tokens, "hidden": WIDTH, "intermediate": INTERMEDIATE,
        "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "spectrum_of": "the demo model's layers, medians",
    }  # fmt: skip
    Record("scale", figures, config).write(RESULTS / f"scale-8b-width-{profile}.json")
    print(json.dumps(figures, indent=1))


def _fit(layers: int, profile: str, size: float, tokens: int) -> dict[str, Any]:
    import torch
    from peak_memory import forget_peak, status_bytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcar.cache.coder import PageCoder
    from kvcar.fit.fit import fit_bundles
    from kvcar.fit.options import PROFILES, FitOptions
    from kvcar.fit.partition import searched_bands
    from kvcar.fit.statistics import Statistics
    from kvcar.sizes import times_smaller
    from kvcar.text import TextSource

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=2048, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    give_spectra(model)
    windows = torch.randint(3, 2048, (tokens // 512, 512), generator=torch.Generator().manual_seed(1))
    fallen: list[torch.Tensor] = []
    variances = Statistics.variances
    Statistics.variances = lambda self, slots: fallen.append(variances(self, slots)) or fallen[-1]
    forget_peak()
    before, began = status_bytes("VmRSS"), time.perf_counter()
    options, source = FitOptions(size, profile=profile, effect_tokens=512), TextSource("random tokens", "", "0" * 64)
    bundle = next(fit_bundles(model, windows, [options], source, "random-8b-width"))
    seconds, peak, plan = time.perf_counter() - began, status_bytes("VmHWM") - before, bundle.plan
    band, shared_band = searched_bands(plan.geometry, PROFILES[profile])
    in_use = PageCoder(bundle, torch.device("cpu"), torch.float32).codec_bytes()
    layer_bytes = sum(p.numel() for p in model.model.layers[0].parameters()) * _WEIGHT_BYTES
    return {
        "band": band,
        "shared_band": shared_band,
        "peak_growth_bytes": peak,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "codec_bytes": in_use,
        "layer_weight_bytes": layer_bytes,
        "codecs_per_layer_weights": in_use / layers / layer_bytes,
        "places": PLACES,
        "log10_variances": heights_of(fallen),
        "log10_variances_demo": SPECTRUM["both"],
        "blocks": [_block(block, HEAD_DIM) for block in plan.blocks],
        "seconds": seconds,
        "times_smaller": times_smaller(plan, 4),
    }


def _block(block: Any, head_dim: int) -> dict[str, int]:
    return {
        "layers": len({slot.layer for slot in block.slots}),
        "elements": len(block.slots) * head_dim,
        "latents": block.latents,
        "bits": sum(group.bits * group.count for group in block.groups),
    }


if __name__ == "__main__":
    typer.run(main)
