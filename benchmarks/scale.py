"""Memory of a fit at the width of an 8B model (8 KV heads of 128), with random weights at reduced depth.

python benchmarks/scale.py

Statistics take ``W**2 * 8`` bytes for every pair of sides that may share a block (``W = KV heads x head dim``; sides of one kind
less than ``band`` layers apart, keys and values less than ``shared_band``), and metrics ``layers * W**2 * 8`` each, so the whole model's follow from what is measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"
WIDTH, QUERY_HEADS, KV_HEADS, HEAD_DIM, FULL_LAYERS = 4096, 32, 8, 128, 32


def statistics_bytes(layers: int, band: int, shared_band: int) -> int:
    """Bytes of the moments and metrics of a model of this width."""
    side = (KV_HEADS * HEAD_DIM) ** 2 * 8
    of_one_kind = 2 * sum(min(band, layers - first) for first in range(layers))
    of_both = sum(abs(i - j) < shared_band for i in range(layers) for j in range(layers))
    return (of_one_kind + of_both + 2 * layers) * side


def main(
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 3,
    profile: str = "balanced",
    tokens: int = 6144,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Fit in a child process and record how far its memory rose above the model's."""
    if child:
        print(json.dumps(_fit(layers, profile, tokens)))
        return
    command = [
        sys.executable,
        __file__,
        "--child",
        "--layers",
        str(layers),
        "--profile",
        profile,
        "--tokens",
        str(tokens),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(printed.strip().splitlines()[-1])
    figures["statistics_bytes"] = statistics_bytes(layers, figures["band"], figures["shared_band"])
    figures["statistics_bytes_at_32_layers"] = statistics_bytes(FULL_LAYERS, figures["band"], figures["shared_band"])
    config = {
        "layers": layers,
        "profile": profile,
        "tokens": tokens,
        "hidden": WIDTH,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    Record("scale", figures, config).write(RESULTS / f"scale-8b-width-{profile}.json")
    print(json.dumps(figures, indent=1))


def _fit(layers: int, profile: str, tokens: int) -> dict[str, float]:
    import torch
    from peak_memory import forget_peak, status_bytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcar.fit.fit import fit_bundles
    from kvcar.fit.options import PROFILES, FitOptions
    from kvcar.fit.partition import searched_bands
    from kvcar.sizes import times_smaller
    from kvcar.text import TextSource

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=2048, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(3, 2048, (tokens // 512, 512), generator=torch.Generator().manual_seed(1))
    forget_peak()
    before, began = status_bytes("VmRSS"), time.perf_counter()
    options, source = FitOptions(6.0, profile=profile, effect_tokens=512), TextSource("random tokens", "", "0" * 64)
    bundle = next(fit_bundles(model, windows, [options], source, "random-8b-width"))
    plan = bundle.plan
    band, shared_band = searched_bands(plan.geometry, PROFILES[profile])
    return {
        "band": band,
        "shared_band": shared_band,
        "peak_growth_bytes": status_bytes("VmHWM") - before,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "codec_bytes": bundle.codec_bytes,
        "seconds": time.perf_counter() - began,
        "times_smaller": times_smaller(plan, 4),
        "blocks": len(plan.blocks),
    }


if __name__ == "__main__":
    typer.run(main)
