"""Speed of decode steps and of prefill on a real model: caches that take turns in one run, as ratios to each other.

python benchmarks/decode.py wikitext-2/test.txt --name demo -b fast-4x=bundles/fast-4x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import quantized_contenders
from speed.device import device_config, use_threads
from speed.race import Pace, Timings, check_contexts, grow, time_steps
from speed.runners import FULL, STATIC, Runner, bundle_runners, full_runner, read_bundles, twin
from speed.summary import decode_figures, prefill_figures
from transformers import PreTrainedModel

from kvcar.bundle import Bundle
from kvcar.cache.attach import PREFILL_CHUNK_TOKENS, attach
from kvcar.errors import InputError, KVCarError
from kvcar.geometry import BFLOAT16_BYTES
from kvcar.models.geometry import geometry_of
from kvcar.models.load import load_model
from kvcar.record import Record
from kvcar.sizes import compressed_size, full_size, parse_bytes, what_fits
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"
_UNLIMITED_TOKENS = 2**40


def main(
    text: Annotated[Path, typer.Argument(help="A .txt or .jsonl file, what is read and decoded.")],
    name: Annotated[str, typer.Option(help="Of the record.")],
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            "--bundle",
            "-b",
            help="[NAME=]FOLDER; repeatable.",
        ),
    ] = None,
    model: str = "demo",
    contexts: str = "512,1024,2048,4096,6000,8000",
    rounds: Annotated[int, typer.Option(min=1, help="In which everyone has a turn, at each context.")] = 16,
    steps: Annotated[
        int,
        typer.Option(min=1, help="Of a turn; all rounds' should be 128, in which everyone codes anew equally often."),
    ] = 8,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prefill_chunk: Annotated[int, typer.Option(min=1)] = PREFILL_CHUNK_TOKENS,
    transformers: Annotated[str, typer.Option(help="Quantised caches, with commas, or none.")] = "quanto-4bit,hqq-4bit",
    static: bool = True,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: str = "cpu",
    threads: Annotated[int | None, typer.Option(help="Default: torch's choice.")] = None,
    compiled: Annotated[bool, typer.Option(help="Models under torch.compile; take --transformers none.")] = False,
    seed: int = 0,
    memory: Annotated[str, typer.Option(help="For the largest batch, by arithmetic.")] = "1GiB",
    memory_tokens: int = 4096,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Grow every cache through the contexts in turn, timing prefill and, at each context, decode steps; one record."""
    use_threads(threads)
    bundles, pace = read_bundles(bundle or []), Pace(rounds, steps, prefill_chunk, seed)
    lengths, budget = _lengths(contexts), parse_bytes(memory)
    source, loaded = read_text(text), load_model(model, dtype, device)
    geometry = geometry_of(loaded.model)
    check_contexts(lengths, pace, geometry.max_positions)
    ids = token_windows(loaded.tokenizer, source.text, lengths[-1] + pace.tokens, batch).to(loaded.model.device)
    unattached = twin(loaded.model)
    plain = [full_runner(unattached), *_quantized(unattached, transformers)]
    with _attached(loaded.model, bundles):
        runners = [*plain, *bundle_runners(loaded.model, bundles)]
        if compiled:
            _compile(runners, ids, prefill_chunk)
        chunks, timings = _race(runners, ids, lengths, pace, static)
    families = {runner.name: runner.family for runner in runners} | {STATIC: "full"}
    figures = {
        **decode_figures(timings, families, pace.tokens),
        **prefill_figures(runners, chunks, batch),
        "largest_batch": _largest_batch(bundles, full_size(geometry), budget, memory_tokens),
    }
    config = {
        "model": model, "name": name, "text": source.name, "text_sha256": source.sha256, "contexts": lengths,
        "rounds": rounds, "steps": steps, "batch": batch, "prefill_chunk": prefill_chunk, "dtype": dtype, "seed": seed, "compiled": compiled,
        "contenders": {r.name: {"family": r.family, **r.config} for r in runners}, **device_config(ids.device),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    Record("decode", figures, config).write(output / f"decode-{name}.json")
    _print(figures)


def _lengths(contexts: str) -> list[int]:
    try:
        return [int(each) for each in contexts.split(",")]
    except ValueError:
        raise InputError(f"contexts are numbers with commas between them, got {contexts!r}") from None


def _quantized(model: PreTrainedModel, chosen: str) -> list[Runner]:
    """Quantised caches of transformers; one whose package is missing is told and left out."""
    names = [] if chosen == "none" else chosen.split(",")
    found, missing = quantized_contenders(model.config, geometry_of(model), names)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}", flush=True)
    return [Runner(each.name, "transformers", model, each.make, dict(each.config)) for each in found]


def _attached(model: PreTrainedModel, bundles: Mapping[str, Bundle]) -> Any:
    """Attach the model once, for all of its bundles."""
    return attach(model, next(iter(bundles.values()))) if bundles else nullcontext()


def _compile(runners: Sequence[Runner], ids: Any, chunk: int) -> None:
    for model in {id(runner.model): runner.model for runner in runners}.values():
        model.forward = torch.compile(model.forward)
    for runner in runners:
        runner.warm_up(ids, chunk)
        print(f"compiled for {runner.name}", flush=True)


def _race(
    runners: Sequence[Runner], ids: Any, contexts: Sequence[int], pace: Pace, static: bool
) -> tuple[list[tuple[int, int]], list[Timings]]:
    chunks: list[tuple[int, int]] = []
    timings = []
    for context in contexts:
        chunks += grow(runners, ids, context, pace)
        timings.append(time_steps(runners, ids, pace, static, lambda line: print(line, flush=True)))
    return chunks, timings


def _largest_batch(bundles: Mapping[str, Bundle], full: Any, memory_bytes: int, tokens: int) -> dict[str, Any]:
    """Count sequences that fit beside the weights, by the arithmetic that the runtime's tensors obey, in bfloat16."""
    sizes = {FULL: full} | {name: compressed_size(each.plan, BFLOAT16_BYTES) for name, each in bundles.items()}
    largest = {
        n: what_fits(size, memory_bytes, 1, tokens, _UNLIMITED_TOKENS).largest_batch for n, size in sizes.items()
    }
    return {"memory_bytes": memory_bytes, "tokens": tokens, "sequences": largest}


def _print(figures: dict[str, Any]) -> None:
    for at in figures["decode"]:
        for name, row in at["contenders"].items():
            step, ratio = row["step"], row["ratio_to_full"]["median"]
            print(f"{at['context']:>6} {name:<20} {step['median_ms']:9.2f} ms  x {ratio:.3f}")
    for name, row in figures["prefill"]["contenders"].items():
        print(f"prefill {name:<20} {row['tokens_per_second']:8.1f} tokens/s, time x {row['time_ratio_of_sums']:.3f}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except KVCarError as error:
        raise SystemExit(f"error: {error}") from None
