"""The demo: fit, measure and try a compressed cache on the demo model, and what goes on its page.

Its bundle is fitted as ``kvcar fit`` fits by default, on fewer tokens, and is measured on two kinds of text that every
machine with Python has: the part of the embedded English text that was held out, and Python code, which is no kind that
was fitted on.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ..bundle import Bundle, bits_by_layer
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..evaluate.memory import bfloat16_bytes
from ..fit.fit import fit_bundles, lossless
from ..fit.options import FitOptions
from ..fit.windows import text_windows
from ..models.demo import ALIAS
from ..models.load import LoadedModel, load_model
from ..models.structure import cache_argument
from ..progress import OnProgress, counter, silent
from ..record import Record, provenance, write_text
from ..sizes import pays_from_tokens
from ..text import TextSource, fit_texts, token_windows
from .page import GeneratedText, PageRow, PageTable, render_page
from .plots import Point, bits_per_layer, quality_against_size

COMPRESSED = "5x"
IDENTITY = "identity"
ENGLISH, CODE = "English documentation, held out of the fit", "Python code, another kind of text"
_FIT_TOKENS, _EFFECT_TOKENS = 12_288, 3072
_EVAL_CONTEXT = 1024
_PROMPT_TOKENS, _NEW_TOKENS = 600, 48
_QUESTION = "Explain in three sentences what the text above is about."
_MODEL = "SmolLM2-135M-Instruct, its weights dequantised from a Q4_1 file, run in float32"


@dataclass(frozen=True)
class Generated:
    """A continuation of the demo's prompt, and what it took."""

    text: str
    tokens: int
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class Demo:
    """What a run of the demo found.

    Attributes:
        bundles: the lossless one and the fitted one, by name.
        source: what they were fitted on.
        texts: what they were measured on, by kind.
        fidelity: of both bundles, by kind and name.
        prompt: what was continued.
        generated: continuations, of the full cache and of the compressed one.
        seconds: of all of it.
    """

    bundles: Mapping[str, Bundle]
    source: TextSource
    texts: Mapping[str, TextSource]
    fidelity: Mapping[str, Mapping[str, Fidelity]]
    prompt: str
    generated: Mapping[str, Generated]
    seconds: float

    @property
    def compressed(self) -> Bundle:
        """The fitted bundle."""
        return self.bundles[COMPRESSED]


def run_demo(on_progress: OnProgress = silent) -> Demo:
    """Fit, measure and generate."""
    began = time.perf_counter()
    _, (held_out,) = fit_texts(None, True)
    texts = {ENGLISH: held_out, CODE: python_code()}
    loaded = load_model(ALIAS, dtype="float32", on_step=on_progress)
    options = FitOptions(effect_tokens=_EFFECT_TOKENS)
    read = text_windows(loaded.model, loaded.tokenizer, None, _FIT_TOKENS, options, False, on_progress=on_progress)
    source = read.source
    (fitted,) = fit_bundles(loaded.model, read.windows, [options], source, ALIAS, on_progress)
    bundles = {IDENTITY: lossless(loaded.model, name=ALIAS), COMPRESSED: fitted}
    with attach(loaded.model, bundles[IDENTITY]):
        fidelity = {kind: _measure(loaded, bundles, text, kind, on_progress) for kind, text in texts.items()}
    prompt, generated = _generate(loaded, fitted, held_out, on_progress)
    bundles = {
        name: bundle.with_figures({"held_out": fidelity_figures(fidelity[ENGLISH][name])})
        for name, bundle in bundles.items()
    }
    return Demo(bundles, source, texts, fidelity, prompt, generated, time.perf_counter() - began)


def python_code() -> TextSource:
    """Read a module of Python's standard library as text."""
    text = inspect.getsource(argparse)
    return TextSource("argparse.py of Python's standard library", text, hashlib.sha256(text.encode()).hexdigest())


def _measure(
    loaded: LoadedModel, bundles: Mapping[str, Bundle], text: TextSource, kind: str, on_progress: OnProgress
) -> dict[str, Fidelity]:
    """Step all bundles and the full cache over one window of a text, side by side."""
    ids = token_windows(loaded.tokenizer, text.text, _EVAL_CONTEXT, 1)
    on_chunk = counter(on_progress, f"evaluate: {kind}", ids.numel())
    caches = {n: (lambda bundle=b: KVCarCache(bundle)) for n, b in bundles.items()}
    return measure_fidelity(loaded.model, ids, caches, on_chunk)


def _generate(
    loaded: LoadedModel, bundle: Bundle, text: TextSource, on_progress: OnProgress
) -> tuple[str, dict[str, Generated]]:
    """Continue a prompt, long enough to fill pages, with the full cache and with the compressed one."""
    excerpt = loaded.tokenizer.decode(token_windows(loaded.tokenizer, text.text, _PROMPT_TOKENS, 3)[1]).strip()
    prompt = f"{excerpt}\n\n{_QUESTION}"
    inputs = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    count = counter(on_progress, "generate", 2)
    generated = {"full": _continue(loaded, inputs, DynamicCache(config=loaded.model.config))}
    count(1)
    with attach(loaded.model, bundle) as attached:
        generated[COMPRESSED] = _continue(loaded, inputs, attached.new_cache())
    count(1)
    return prompt, generated


def _continue(loaded: LoadedModel, inputs: Any, cache: Cache) -> Generated:
    began = time.perf_counter()
    with torch.no_grad():
        ids: Any = loaded.model.generate(
            **inputs, **cache_argument(loaded.model, cache), max_new_tokens=_NEW_TOKENS, do_sample=False
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    stored = cache.stored_bytes(in_bfloat16=True) if isinstance(cache, KVCarCache) else bfloat16_bytes(cache)
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Generated(text, len(new), time.perf_counter() - began, stored)


def write_demo(found: Demo, folder: Path) -> Path:
    """Write bundles, records and the page into a folder; give the page's path."""
    for name, bundle in found.bundles.items():
        bundle.save_pretrained(folder / f"bundle-{name}", overwrite=True)
    common = {"model": ALIAS, "fit_text": found.source.name}
    for (kind, text), label in zip(found.texts.items(), ("english", "code"), strict=True):
        for name, result in found.fidelity[kind].items():
            config = {**common, "text": text.name, "cache": name, "fit": dict(found.bundles[name].fit.options)}
            Record("fidelity", fidelity_figures(result), config).write(folder / f"fidelity-{label}-{name}.json")
    for name, each in found.generated.items():
        figures = {
            "text": each.text,
            "new_tokens": each.tokens,
            "seconds": each.seconds,
            "cache_bytes": each.cache_bytes,
        }
        Record("generation", figures, {**common, "cache": name}).write(folder / f"generation-{name}.json")
    page = folder / "index.html"
    write_text(page, _page(found))
    return page


def _page(found: Demo) -> str:
    tables = [
        PageTable(f"{kind} ({found.texts[kind].name})", _rows(found, results))
        for kind, results in found.fidelity.items()
    ]
    plots = {
        "Quality against size, by kind of text": quality_against_size(_points(found)),
        f"Bits per layer, {COMPRESSED}": bits_per_layer(
            bits_by_layer(found.compressed.plan), "average stored bits per key or value element (full: 16)"
        ),
    }
    texts = [
        GeneratedText(
            name,
            each.text.strip(),
            f"{each.cache_bytes:,} bytes of cache{' (in bfloat16)' if name == 'full' else ''}, {each.tokens} tokens, {each.seconds:.1f} s",
        )
        for name, each in found.generated.items()
    ]
    return render_page(
        "A smaller KV cache, and what it costs", _facts(found), tables, plots, found.prompt, texts, _NOTES
    )


def _facts(found: Demo) -> dict[str, str]:
    first, facts = found.fidelity[ENGLISH][IDENTITY], provenance()
    return {
        "model": _MODEL,
        "fitted on": f"{_FIT_TOKENS:,} tokens of {found.source.name}, as kvcar fit does by default",
        "evaluated on": f"{first.context:,} tokens of each text, stepped through the cache",
        "versions": f"kvcar {facts['kvcar']}, torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}",
        "took": f"{found.seconds:.0f} s on {facts['cpu_cores']} cores, {facts['date']}",
    }


def _points(found: Demo) -> list[Point]:
    results = {kind.partition(",")[0]: found.fidelity[kind][COMPRESSED] for kind in found.fidelity}
    return [Point(n, f.times_smaller, f.kl_divergence.value, f.kl_divergence.stderr) for n, f in results.items()]


def _rows(found: Demo, results: Mapping[str, Fidelity]) -> list[PageRow]:
    first = results[IDENTITY]
    full = first.perplexity_full
    head = PageRow(
        name="full, bfloat16 bytes",
        times_smaller="1.00",
        stored_bytes_per_token=f"{first.full_bytes_per_token:,.0f}",
        codec_bytes="0",
        pays_from_tokens="",
        perplexity=f"{full.value:.3f} ± {full.stderr:.3f}",
        perplexity_ratio="1",
        kl_divergence="0",
        same_top="100 %",
    )
    return [head, *(_row(name, found.bundles[name], f) for name, f in results.items())]


def _row(name: str, bundle: Bundle, f: Fidelity) -> PageRow:
    pays = pays_from_tokens(bundle.plan, bundle.codec_bytes)
    return PageRow(
        name=name,
        times_smaller=f"{f.times_smaller:.2f}" if f.times_smaller >= 1 else f"{1 / f.times_smaller:.2f} larger",
        stored_bytes_per_token=f"{f.stored_bytes_per_token:,.0f}",
        codec_bytes=f"{f.codec_bytes:,}",
        pays_from_tokens="never" if pays is None else f"{pays:,}",
        perplexity=f"{f.perplexity.value:.3f}",
        perplexity_ratio=f"{f.perplexity_ratio.value:.4f} ± {f.perplexity_ratio.stderr:.4f}",
        kl_divergence=f"{f.kl_divergence.value:.2g} ± {f.kl_divergence.stderr:.1g}",
        same_top=f"{100 * f.same_top.value:.1f} %",
    )


_NOTES = (
    "Bytes are those of tensors that exist at this context length: codes, exact first and recent tokens, room not yet "
    "filled, position tables. Times smaller is against the model's own cache in bfloat16. The exact tokens weigh more in "
    "a short text than in a long one: the setting is named after the saving at 4,096 tokens.",
    "Codecs are like weights: they exist once, for all sequences, beside the cache. Cache and codecs together are smaller "
    "than the full cache from so many tokens on, of all sequences together, each of 4,096 tokens.",
    "Identity keeps everything, in the float32 that the model runs in (hence twice the bytes of a bfloat16 cache): its "
    "divergence is the noise floor of this measurement.",
    "Divergence is in nats per token; ± is one standard error. Perplexity is stepped through each cache on the same tokens.",
)
