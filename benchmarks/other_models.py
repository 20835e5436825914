"""A model beside the demo model: a bundle on several kinds of text, and on some of them transformers' quantised caches beside it.

kvcar fit MODEL -o qwen-8x --times-smaller 8 --dtype bfloat16
python benchmarks/other_models.py MODEL qwen-8x --name qwen2.5-coder-0.5b --title "Qwen2.5-Coder-0.5B-Instruct" \
    --text wikitext-2=wikitext-2/test.txt --text c4=c4/validation-1k.jsonl[500:] --text german=man.txt
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import Contender, bundle_contender, compare, quantized_contenders
from kinds_of_text import texts_of_this_machine
from torch import Tensor

import kvcar
from kvcar.evaluate.fidelity import fidelity_figures
from kvcar.models.load import load_model
from kvcar.record import Record
from kvcar.text import token_windows

RESULTS = Path(__file__).parent / "results"
RIVALS = ("quanto-4bit", "hqq-4bit")
OF_THIS_MACHINE = ("Python", "JSON")
BUNDLE = "kvcar"


def main(
    model: str,
    bundle: Path,
    name: Annotated[str, typer.Option(help="Of the record.")],
    title: Annotated[str, typer.Option(help="Of the model, for tables.")],
    text: Annotated[list[str] | None, typer.Option(help="KIND=FILE, besides Python and JSON of this machine.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Kinds on which rivals are measured too.")] = None,
    dtype: str = "bfloat16",
    context: int = 2048,
    windows: int = 2,
    output: Path = RESULTS,
) -> None:
    """Measure; the record, ``other-model-NAME.json``, is written anew after each kind of text."""
    torch.set_num_threads(1)
    loaded, fitted = load_model(model, dtype=dtype), kvcar.Bundle.from_pretrained(bundle)
    rivals, missing = quantized_contenders(loaded.model.config, fitted.plan.geometry, RIVALS if against else ())
    for rival, reason in missing.items():
        print(f"{rival} is left out: {reason}")
    given = dict(each.split("=", 1) for each in text or [])
    texts = {kind: kvcar.read_text(path).text for kind, path in given.items()}
    machine = texts_of_this_machine(loaded.tokenizer)
    texts |= {kind: machine[kind] for kind in OF_THIS_MACHINE}
    config = {
        "title": title, "dtype": dtype, "times_smaller": fitted.figures.get("times_smaller"), "context": context, "windows": windows,
        "fit": fitted.fit.model_dump(mode="json"), "codec_bytes": fitted.codec_bytes,
        "pays_from_tokens": fitted.figures.get("pays_from_tokens"), "rivals": {rival.name: rival.config for rival in rivals},
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {}
    with kvcar.attach(loaded.model, fitted):
        for kind, own in texts.items():
            ids = token_windows(loaded.tokenizer, own, context, windows)
            beside = rivals if kind in (against or ()) else []
            kinds[kind] = _measured(loaded.model, ids, [bundle_contender(BUNDLE, fitted), *beside])
            print(kind, json.dumps({row: _shortly(own) for row, own in kinds[kind].items()}), flush=True)
            Record("other-model", {"kinds": kinds}, config).write(output / f"other-model-{name}.json")


def _measured(model: Any, ids: Tensor, contenders: list[Contender]) -> dict[str, Any]:
    """Figures of each contender by name, all stepped beside the same full cache."""
    return {own.name: fidelity_figures(fidelity) for own, fidelity in compare(model, ids, contenders)}


def _shortly(figures: Mapping[str, Any]) -> list[float]:
    return [round(figures[name], 5) for name in ("kl_divergence", "same_top", "perplexity_ratio", "times_smaller")]


if __name__ == "__main__":
    typer.run(main)
