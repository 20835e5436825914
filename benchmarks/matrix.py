"""How codecs carry over: fitted on one kind of text, on several or by default, and measured on every kind.

python benchmarks/matrix.py bundles/matrix --default bundles/demo-8x --fit WikiText-2=wikitext-2/valid.txt --text French=man-fr.txt
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from kinds_of_text import texts_of_this_machine

import kvcar
from kvcar.cli.console import progress_lines
from kvcar.evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from kvcar.models.load import LoadedModel, load_model
from kvcar.progress import counter
from kvcar.record import Record
from kvcar.text import evaluation_texts, token_windows

RESULTS = Path(__file__).parent / "results"
# None of them is measured: `texts_of_this_machine` reads another.
_MODULES = ("argparse", "ast", "calendar", "configparser", "difflib", "inspect", "tarfile", "zipfile")
MIX, DEFAULT = "mix of these", "default"
_KEPT = ("kl_divergence", "kl_divergence_stderr", "kl_divergence_worst_1_percent", "same_top", "times_smaller", "finer_page_share")  # fmt: skip


def main(
    folder: Annotated[Path, typer.Argument(help="Of the bundles; those that are there are not fitted again.")],
    default: Annotated[Path, typer.Option(help="A bundle of a fit without --text, to the same size.")],
    fit: Annotated[list[str] | None, typer.Option(help="KIND=FILE, fitted on; Python's library is always.")] = None,
    bundle: Annotated[
        list[str] | None, typer.Option("--bundle", "-b", help="NAME=BUNDLE, a column that is fitted already.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="KIND=FILE, measured on, besides what this machine has.")
    ] = None,
    model: str = "demo",
    times_smaller: float = 8.0,
    fit_tokens: int = 12_288,
    effect_tokens: int = 4096,
    context: int = 2048,
    windows: int = 1,
) -> None:
    """Fit the columns, measure all rows; a record goes into ``results/``."""
    loaded, tell = load_model(model), progress_lines(60)
    columns = {"Python": [_library(name) for name in _MODULES]} | {
        kind: [kvcar.read_text(path).text] for kind, path in _pairs(fit).items()
    }
    columns[MIX] = ["\n\n".join(texts) for texts in columns.values()]
    bundles = {DEFAULT: kvcar.Bundle.from_pretrained(default)}
    bundles |= {name: kvcar.Bundle.from_pretrained(path) for name, path in _pairs(bundle).items()}
    for kind, texts in columns.items():
        path = folder / kind.replace(" ", "-")
        if not path.exists():
            kvcar.fit(
                loaded.model, loaded.tokenizer, texts, times_smaller=times_smaller, tokens=fit_tokens,
                effect_tokens=effect_tokens, samples=False, check=False, on_progress=tell,
            ).save_pretrained(path)  # fmt: skip
        bundles[kind] = kvcar.Bundle.from_pretrained(path)
    rows = {kind: kvcar.read_text(path).text for kind, path in _pairs(text).items()} | own_texts(loaded.tokenizer)
    found = {}
    for kind, own in rows.items():
        found[kind] = {name: _figures(f) for name, f in measured(loaded, bundles, own, context, windows, tell).items()}
        print(kind, {name: round(f["kl_divergence"], 5) for name, f in found[kind].items()}, flush=True)
    config = {
        "model": model, "times_smaller": times_smaller, "fit_tokens": fit_tokens, "effect_tokens": effect_tokens,
        "context": context, "windows": windows,
        "fits": {name: bundle.fit.model_dump(mode="json") for name, bundle in bundles.items()},
    }  # fmt: skip
    Record("matrix", {"kinds": found}, config).write(RESULTS / "matrix-8x.json")


def own_texts(tokenizer: Any) -> dict[str, str]:
    """Kinds of text that this machine has, chat and sums by themselves."""
    texts = texts_of_this_machine(tokenizer)
    texts.pop("chat with sums")
    return texts | {"chat with template": chat(tokenizer), "sums": sums()}


def chat(tokenizer: Any) -> str:
    """Questions about paragraphs of English text that no fit reads, and the paragraphs as answers, in the model's template."""
    paragraphs = [p for p in evaluation_texts(None)[0].text.split("\n\n") if 200 < len(p) < 900]
    turns = []
    for paragraph in paragraphs:
        words = paragraph.split()
        turns.append({"role": "user", "content": f"Please tell me more about {' '.join(words[:4])}. What does it do?"})
        turns.append({"role": "assistant", "content": " ".join(words)})
    return tokenizer.apply_chat_template(turns, tokenize=False)


def sums() -> str:
    """Lines of arithmetic, all of them right."""
    draw, lines = random.Random(5), []
    for _ in range(400):
        a, b = draw.randrange(2, 999), draw.randrange(2, 99)
        lines += [f"{a} + {b} = {a + b}", f"{a} * {b} = {a * b}", f"{a} - {b} = {a - b}"]
    return "\n".join(lines)


def measured(
    loaded: LoadedModel, bundles: Mapping[str, kvcar.Bundle], text: str, context: int, windows: int, tell: Any
) -> dict[str, Fidelity]:
    """Step all bundles and the full cache over the same windows of a text."""
    ids = token_windows(loaded.tokenizer, text, context, windows)
    caches = {name: lambda bundle=bundle: kvcar.KVCarCache(bundle) for name, bundle in bundles.items()}
    with kvcar.attach(loaded.model, bundles[DEFAULT]):
        return measure_fidelity(loaded.model, ids, caches, counter(tell, "measure", ids.numel()))


def _figures(fidelity: Fidelity) -> dict[str, Any]:
    figures = fidelity_figures(fidelity)
    return {name: figures[name] for name in _KEPT}


def _library(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def _pairs(given: list[str] | None) -> dict[str, str]:
    pairs = (each.partition("=") for each in given or [])
    return {kind: path for kind, _, path in pairs}


if __name__ == "__main__":
    typer.run(main)
