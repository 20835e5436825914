"""Contenders of ``serve_vllm.py`` and ``serve_vllm_load.py``: vLLM's own cache and bundles, and how their engines are set up."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcar.bundle import Bundle
from kvcar.text import read_text

STOCK = "vLLM"
RESULTS = Path(__file__).parent / "results"

Name = Annotated[str, typer.Option(help="Of the record.")]
Model = Annotated[str, typer.Option(help="Folder of the model.")]
Bundles = Annotated[list[str] | None, typer.Option("--bundle", "-b", help="NAME=FOLDER; repeatable.")]
Memory = Annotated[str, typer.Option(help="For the cache.")]
PassTokens = Annotated[str, typer.Option(help="Of kvcar's contenders; with commas for several.")]
Fp8 = Annotated[bool, typer.Option(help="Also vLLM's own cache in 8 bits.")]
Output = Annotated[Path, typer.Option(help="Folder of the record.")]


def contenders(bundles: list[str], tokens_of_a_pass: list[int], fp8: bool) -> dict[str, dict[str, Any]]:
    """Name the caches to compare: vLLM's own, the same in 8 bits, and bundles given as ``NAME=FOLDER``."""
    found: dict[str, dict[str, Any]] = {STOCK: {}} | ({f"{STOCK} fp8": {"kv_cache_dtype": "fp8"}} if fp8 else {})
    for each in bundles:
        label, folder = each.split("=", 1)
        for tokens in tokens_of_a_pass:
            found[f"{label}, {tokens} tokens a pass"] = {"bundle": folder, "max_num_batched_tokens": tokens}
    return found


def environment(threads: int) -> dict[str, str]:
    """Variables of a process that runs vLLM."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def engine_options(given: dict[str, Any], memory: int, tokens: int) -> dict[str, Any]:
    """Options of one contender's engine, with ``memory`` bytes of cache and sequences of up to ``tokens`` tokens."""
    own: dict[str, Any] = {}
    if "bundle" in given:
        options = {"bundle": given["bundle"], "max_num_batched_tokens": given["max_num_batched_tokens"]}
        own = {"attention_backend": "CUSTOM", "additional_config": {"kvcar": options}}
    if "kv_cache_dtype" in given:
        own = {"kv_cache_dtype": given["kv_cache_dtype"]}
    return {
        "model": given["model"], "dtype": given["dtype"], "max_model_len": tokens, "kv_cache_memory_bytes": memory,
        "max_num_seqs": 64, "enforce_eager": True, "seed": 0, **own,
    }  # fmt: skip


def described(given: dict[str, Any], caches: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """A record's configuration: names of files instead of where they lie, and what the bundles are."""
    source = read_text(Path(given["text"])) if "text" in given else None
    text = {"text": source.name, "text_sha256": source.sha256} if source else {}
    return given | text | {
        "name": name, "model": Path(given["model"]).name, "vllm": version("vllm-cpu"),
        "contenders": {label: own | _bundle(own["bundle"]) if "bundle" in own else own for label, own in caches.items()},
    }  # fmt: skip


def command() -> list[str]:
    """Give the command line; of folders the names alone, as where they lie is nobody's business."""
    return [Path(sys.argv[0]).name, *(re.sub(r"[^ =]*/", "", part) for part in sys.argv[1:])]


def _bundle(folder: str) -> dict[str, Any]:
    bundle = Bundle.from_pretrained(folder)
    plan, options = bundle.plan, bundle.fit.options if bundle.fit else {}
    return {
        "bundle": Path(folder).name, "bundle_digest": bundle.digest, "profile": options.get("profile"),
        "times_smaller": options.get("times_smaller"), "page_tokens": plan.page_tokens, "window": plan.window,
        "sinks": plan.sinks,
    }  # fmt: skip
