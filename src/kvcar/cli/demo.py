"""``kvcar demo``: the whole of it on a small real model, in a few minutes on two cores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Cache, DynamicCache

from ..bundle import Bundle, bits_by_layer
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..errors import InputError
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..evaluate.memory import bfloat16_bytes
from ..fit.fit import fit_bundles
from ..fit.options import FitOptions, Structure
from ..models.demo import ALIAS
from ..models.load import LoadedModel, load_model
from ..progress import OnProgress, counter
from ..record import Record, provenance, write_text
from ..report.page import GeneratedText, PageRow, render_page
from ..report.plots import Point, bits_per_layer, quality_against_size
from ..text import TextSource, token_windows
from .app import app
from .console import out, progress_bars
from .figures import fidelity_table
from .texts import fit_and_check_text

_FIT_CONTEXT, _FIT_WINDOWS = 1024, 24
_EVAL_CONTEXT, _EVAL_WINDOWS = 2048, 1
_NEW_TOKENS = 48
_IDENTITY = "identity"
_SETTINGS = {
    _IDENTITY: FitOptions(structure=Structure(codec="identity")),
    "5x": FitOptions(5, structure=Structure(layers_per_block=5, metric="effect"), effect_tokens=3072),
    "8x": FitOptions(8, structure=Structure(layers_per_block=5, metric="effect"), effect_tokens=3072),
}
_QUESTION = "Explain in three sentences what the text above is about."

_EXAMPLES = """Fit, measure and try a compressed cache on SmolLM2-135M, and write a page about it.

The first run downloads 98 MB. Everything goes into one folder, by default ./kvcar-demo.

[bold]Examples[/]

  kvcar demo

  kvcar demo --output /tmp/demo
"""


@dataclass(frozen=True)
class _Generated:
    """A continuation of the demo's prompt."""

    text: str
    tokens: int
    seconds: float
    cache_bytes: int


@app.command(help=_EXAMPLES)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the page, the figures and the bundles go.")
    ] = Path("kvcar-demo"),
) -> None:
    """Run the demo; the help text says what it does."""
    _prepare(output)
    began = time.perf_counter()
    source, held = fit_and_check_text(None, hold_back=True)
    assert held is not None
    with progress_bars() as tell:
        loaded = load_model(ALIAS, dtype="float32", on_step=tell)
        fit_ids = token_windows(loaded.tokenizer, source.text, _FIT_CONTEXT, _FIT_WINDOWS)
        bundles = dict(
            zip(
                _SETTINGS,
                fit_bundles(loaded.model, fit_ids, list(_SETTINGS.values()), source, ALIAS, tell),
                strict=True,
            )
        )
        results = _evaluate(loaded, bundles, held, tell)
        prompt, texts = _generate(loaded, bundles, held, tell)
    for name, bundle in bundles.items():
        bundle.save_pretrained(output / f"bundle-{name}", overwrite=True)
    seconds = time.perf_counter() - began
    _write_records(output, results, texts, source, held)
    page = output / "index.html"
    write_text(page, _page(bundles, results, prompt, texts, source, held, seconds))
    out.print(fidelity_table(results))
    for name, text in texts.items():
        out.print(f"\n[bold]{name}[/] ({text.cache_bytes:,} bytes of cache):")
        out.print(text.text.strip(), markup=False, highlight=False)
    out.print(f"\n[bold]{page}[/] has the table, the plots and the texts; took {seconds:.0f} s", highlight=False)


def _prepare(output: Path) -> None:
    """Make the folder before any work is done."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".kvcar-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; choose another folder with --output") from None


def _evaluate(
    loaded: LoadedModel, bundles: Mapping[str, Bundle], held: TextSource, tell: OnProgress
) -> dict[str, Fidelity]:
    """All bundles against the full cache on held-out text, side by side."""
    ids = token_windows(loaded.tokenizer, held.text, _EVAL_CONTEXT, _EVAL_WINDOWS)
    on_chunk = counter(tell, "evaluate on held-out text", ids.numel())
    with attach(loaded.model, bundles["5x"]):
        caches = {
            name: (lambda bundle=bundle: KVCarCache(bundle, keep_decoded=True)) for name, bundle in bundles.items()
        }
        return measure_fidelity(loaded.model, ids, caches, on_chunk)


def _generate(
    loaded: LoadedModel, bundles: Mapping[str, Bundle], held: TextSource, tell: OnProgress
) -> tuple[str, dict[str, _Generated]]:
    """The same prompt, long enough to fill pages, continued with the full cache and with the compressed ones."""
    excerpt = loaded.tokenizer.decode(token_windows(loaded.tokenizer, held.text, 600, 3)[1]).strip()
    prompt = f"{excerpt}\n\n{_QUESTION}"
    messages = [{"role": "user", "content": prompt}]
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    texts = {}
    with attach(loaded.model, bundles["5x"]):
        makers: dict[str, Any] = {"full": lambda: DynamicCache(config=loaded.model.config)}
        makers |= {name: (lambda bundle=b: KVCarCache(bundle)) for name, b in bundles.items() if name != _IDENTITY}
        for index, (name, make) in enumerate(makers.items()):
            tell("generate", index, len(makers))
            texts[name] = _continue(loaded, inputs, make())
        tell("generate", len(makers), len(makers))
    return prompt, texts


def _continue(loaded: LoadedModel, inputs: Any, cache: Cache) -> _Generated:
    began = time.perf_counter()
    with torch.no_grad():
        ids: Any = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=_NEW_TOKENS, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    stored = cache.stored_bytes() if isinstance(cache, KVCarCache) else bfloat16_bytes(cache)
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return _Generated(text, len(new), time.perf_counter() - began, stored)


def _write_records(
    output: Path, results: Mapping[str, Fidelity], texts: Mapping[str, _Generated], source: TextSource, held: TextSource
) -> None:
    config = {"model": ALIAS, "fit_text": source.name, "evaluation_text": held.name}
    for name, result in results.items():
        setting = {**config, "cache": name, "fit": _SETTINGS[name].as_dict()}
        Record("fidelity", fidelity_figures(result), setting).write(output / f"fidelity-{name}.json")
    for name, text in texts.items():
        figures = {
            "text": text.text,
            "new_tokens": text.tokens,
            "seconds": text.seconds,
            "cache_bytes": text.cache_bytes,
        }
        Record("generation", figures, {**config, "cache": name}).write(output / f"generation-{name}.json")


def _page(
    bundles: Mapping[str, Bundle],
    results: Mapping[str, Fidelity],
    prompt: str,
    texts: Mapping[str, _Generated],
    source: TextSource,
    held: TextSource,
    seconds: float,
) -> str:
    first = results[_IDENTITY]
    facts = provenance()
    shown = {
        "model": "SmolLM2-135M-Instruct, run in float32",
        "fitted on": f"{_FIT_CONTEXT * _FIT_WINDOWS:,} tokens of {source.name}",
        "evaluated on": f"{first.tokens + first.windows:,} tokens of {held.name}, at context {first.context:,}, stepped through the cache",
        "versions": f"kvcar {facts['kvcar']}, torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}",
        "took": f"{seconds:.0f} s on {facts['cpu_cores']} cores, {facts['date']}",
    }
    rows = [_full_row(first), *(_row(name, result) for name, result in results.items())]
    compressed = [name for name in results if name != _IDENTITY]
    points = [
        Point(n, results[n].times_smaller, results[n].kl_divergence.value, results[n].kl_divergence.stderr)
        for n in compressed
    ]
    plots = {"Quality against size": quality_against_size(points)}
    for name in compressed:
        layers = bits_by_layer(bundles[name].plan)
        plots[f"Bits per layer, {name}"] = bits_per_layer(
            layers, "average stored bits per key or value element (full: 16)"
        )
    shown_texts = [
        GeneratedText(
            name,
            text.text.strip(),
            f"{text.cache_bytes:,} bytes of cache{' (in bfloat16)' if name == 'full' else ''}, {text.tokens} tokens, {text.seconds:.1f} s",
        )
        for name, text in texts.items()
    ]
    return render_page("A smaller KV cache, and what it costs", shown, rows, plots, prompt, shown_texts, _NOTES)


_NOTES = (
    "Bytes are those of tensors that exist at this context length: codes, exact first and recent tokens, room not yet "
    "filled, position tables. Times smaller is against the model's own cache in bfloat16. The exact tokens weigh more in "
    "a short text than in a long one: the settings are named after the saving at 4,096 tokens.",
    "Identity keeps everything, in the float32 that the model runs in (hence twice the bytes of a bfloat16 cache): its "
    "divergence is the noise floor of this measurement.",
    "Divergence is in nats per token; ± is one standard error. Perplexity is stepped through each cache on the same tokens.",
)


def _full_row(any_result: Fidelity) -> PageRow:
    full = any_result.perplexity_full
    return PageRow(
        "full, bfloat16 bytes",
        "1.00",
        f"{any_result.full_bytes_per_token:,.0f}",
        f"{full.value:.3f} ± {full.stderr:.3f}",
        "1",
        "0",
        "100 %",
    )


def _row(name: str, f: Fidelity) -> PageRow:
    return PageRow(
        name=name,
        times_smaller=f"{f.times_smaller:.2f}",
        stored_bytes_per_token=f"{f.stored_bytes_per_token:,.0f}",
        perplexity=f"{f.perplexity.value:.3f}",
        perplexity_ratio=f"{f.perplexity_ratio.value:.4f} ± {f.perplexity_ratio.stderr:.4f}",
        kl_divergence=f"{f.kl_divergence.value:.2g} ± {f.kl_divergence.stderr:.1g}",
        same_top=f"{100 * f.same_top.value:.1f} %",
    )
