"""Every decoder that transformers knows by name, tiny and random, over kvcar's caches: which work, and what the others are told.

python benchmarks/families.py              # all of them; writes the record
python benchmarks/families.py qwen3_next   # some of them, printed
python benchmarks/families.py bloom --update   # some of them, anew in the record that is there; it says which and when

Each family runs in a process of its own with limits on time and memory: lossless pages against the model's own cache over a prefill in
chunks, steps and a padded batch; rotations taken back; then a fit, and a coded bundle that is run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tiny_families import VOCABULARY, causal_names, image_text_names, tiny_family
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import kvcar
from kvcar.errors import KVCarError
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions, Structure
from kvcar.models.structure import cache_argument, evaluating
from kvcar.plan import CacheConfig
from kvcar.record import Record, provenance
from kvcar.text import TextSource

RESULTS = Path(__file__).parent / "results"
SECONDS, MEMORY_BYTES = 120, 3 << 30
_PATIENCE = 20  # times as long on the clock, where others use the machine too
CACHE = CacheConfig(window=32, sinks=4, page_tokens=32)
CHUNKS = (70, 40, 25, 1, 1, 1)
PADDING = 9
LOSSLESS_NOISE = 1e-3
"""Root mean square of what sums in another order may change, as a share of the logits'."""
LARGEST_KL = 0.05
"""Of codes of 8 bits; a tiny random model that does what kvcar thinks it does stays far below."""


def family(name: str) -> dict[str, Any]:
    """Try one family; ``result`` says how it went, ``message`` why it did not work."""
    try:
        model = tiny_family(name)
        own = run(model, lambda: DynamicCache(config=model.config))
    except Exception as error:
        return _judged_without(name, error)
    captured: list[int] = []
    try:
        return {"model": type(model).__name__, **_tried(model, own, captured)}
    except KVCarError as error:
        result = "refused late" if captured else "refused"
        return {"model": type(model).__name__, "result": result, "message": in_a_line(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {
            "model": type(model).__name__, "result": "another's exception", "message": f"{in_a_line(error)} ({place})",
        }  # fmt: skip


def _judged_without(name: str, error: Exception) -> dict[str, Any]:
    """Of a model that does not run over its own cache: kvcar's reason against it, if it has one."""
    try:
        kvcar.lossless(tiny_family(name))
    except KVCarError as refusal:
        return {"result": "refused", "message": in_a_line(refusal)}
    except Exception:
        pass
    return {"result": "does not run by itself", "message": in_a_line(error)}


def run(model: PreTrainedModel, new_cache: Callable[[], Cache]) -> Tensor:
    """Logits of all tokens that are no padding ``[tokens, V]``: one sequence alone, then two of which one is padded."""
    return torch.cat([_logits(model, new_cache, 1, 0), _logits(model, new_cache, 2, PADDING)])


@torch.no_grad()
def _logits(model: PreTrainedModel, new_cache: Callable[[], Cache], batch: int, padding: int) -> Tensor:
    total = sum(CHUNKS)
    ids = torch.randint(3, VOCABULARY - 32, (batch, total), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, parts, start = new_cache(), [], 0
    with evaluating(model):
        for count in CHUNKS:
            stop = start + count
            given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **cache_argument(model, cache)}
            if "position_ids" in model.forward.__code__.co_varnames:
                given["position_ids"] = positions[:, start:stop]
            parts.append(model(**given, use_cache=True).logits.float())
            start = stop
    return torch.cat(parts, dim=1)[mask.bool()]


def _tried(model: PreTrainedModel, own: Tensor, captured: list[int]) -> dict[str, Any]:
    lossless = kvcar.lossless(model, cache=CACHE)
    found: dict[str, Any] = {"layers": _layers(lossless)}
    with kvcar.attach(model, lossless) as attached:
        found["lossless_error"] = _difference(run(model, attached.new_cache), own)
        found["turned_back"] = sorted(attached._rotations)
    if not found["lossless_error"] <= LOSSLESS_NOISE:
        return found | {"result": "wrong", "message": f"lossless pages differ by {found['lossless_error']:.2g}"}
    windows = torch.randint(3, VOCABULARY - 32, (4, 256), generator=torch.Generator().manual_seed(7))

    def on_progress(what: str, done: int, total: int) -> None:
        del what, total
        if done:
            captured.append(done)

    options = [
        FitOptions(structure=Structure(codec="linear8", bits=8, metric="effect"), cache=CACHE, effect_tokens=256)
    ]
    source = TextSource("random", "random", "0" * 64)
    bundle = next(fit_bundles(model, windows, options, source, "tiny", on_progress))
    with kvcar.attach(model, bundle) as attached:
        found["kl"] = kl_divergence(own, run(model, attached.new_cache))
    if not found["kl"] <= LARGEST_KL:
        return found | {"result": "wrong", "message": f"codes of 8 bits: KL {found['kl']:.2g}"}
    return found | {"result": "partly" if found["layers"]["growing, not coded"] else "works", "message": ""}


def _layers(bundle: kvcar.Bundle) -> dict[str, int]:
    """How many layers are coded, and how many of each kind are not."""
    geometry, coded = bundle.plan.geometry, len(bundle.plan.coded_layers)
    sliding = len(set(geometry.sliding_layers) - set(bundle.plan.coded_layers))
    growing = sum(geometry.elements_of(layer) > 0 for layer in geometry.own_layers)
    states = geometry.layers - coded - sliding - growing
    return {"coded": coded, "sliding, exact": sliding, "growing, not coded": growing, "of another kind": states}


def _difference(got: Tensor, expected: Tensor) -> float:
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((got - expected).square().mean().sqrt() / spread.clamp_min(1e-12))


def kl_divergence(expected: Tensor, got: Tensor) -> float:
    """Mean KL divergence in nats per token of logits ``[tokens, V]``."""
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def in_a_line(error: Exception) -> str:
    """Name of the error, unless it is kvcar's, and what it says."""
    said = " ".join(str(error).split())[:400]
    return said if isinstance(error, KVCarError) else f"{type(error).__name__}: {said}"


def limited(name: str) -> dict[str, Any]:
    """Run ``family`` in a process that is ended when it takes too long or too much."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sending))
    started = time.perf_counter()
    process.start()
    sending.close()
    try:
        patience = _PATIENCE * SECONDS
        found = receiving.recv() if receiving.poll(patience) else {"result": "too slow", "message": f"{patience} s"}
    except EOFError:
        found = {"result": "ended", "message": f"its process ended, or took more than {SECONDS} s of a core"}
    process.kill()
    process.join()
    return {"name": name, "seconds": round(time.perf_counter() - started, 1)} | found


def _child(name: str, sending: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sending.send(family(name))


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Some of them; nothing is recorded without --update.")
    ] = None,
    images: Annotated[bool, typer.Option(help="Models of images and text, too.")] = True,
    update: Annotated[
        bool, typer.Option("--update", help="Put those that are named into the record that is there.")
    ] = False,
    output: Path = RESULTS,
) -> None:
    """Try families and write what was seen."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    mappings = {"causal": causal_names(), "image and text": image_text_names() if images else []}
    found: dict[str, list[dict[str, Any]]] = {}
    for mapping, all_names in mappings.items():
        found[mapping] = []
        for name in names or all_names:
            if name in all_names:
                each = limited(name)
                found[mapping].append(each)
                print(f"{name:28} {each['result']:12} {each['seconds']:5} {each.get('message', '')[:200]}", flush=True)
    config: dict[str, Any] = {
        "chunks": CHUNKS, "padding": PADDING, "lossless_noise": LOSSLESS_NOISE, "largest_kl": LARGEST_KL
    }  # fmt: skip
    whole = None
    if names and update:
        before = json.loads((output / "families.json").read_text(encoding="utf-8"))
        found, config, whole = updated(before, found), before["config"], before["provenance"]
        now = {key: value for key, value in provenance().items() if key in ("commit", "date", "transformers")}
        config["updated"] = [*config.get("updated", []), now | {"names": sorted(names)}]
    counts = {mapping: dict(Counter(each["result"] for each in own)) for mapping, own in found.items()}
    print(json.dumps(counts, indent=1))
    if names and not update:
        return
    figures = {"counts": counts, "families": found}
    record = Record("families", figures, config) if whole is None else Record("families", figures, config, whole)
    record.write(output / "families.json")


def updated(before: Mapping[str, Any], found: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a record with those that were ``found`` anew in their places."""
    return {
        mapping: [next((new for new in found.get(mapping, []) if new["name"] == old["name"]), old) for old in rows]
        for mapping, rows in before["families"].items()
    }


if __name__ == "__main__":
    typer.run(main)
