"""What a bundle costs on many kinds of text, and on prompts that codes fail on: each kind against the full cache, through the kernels.

kvcar fit demo -o demo-8x --times-smaller 8
python benchmarks/kinds_of_text.py demo-8x --name default-8x --text wikitext-2=wikitext-2/test.txt --text german=man.txt
"""

from __future__ import annotations

import base64
import json
import random
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import kvcar
from kvcar.evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from kvcar.models.load import load_model
from kvcar.record import Record
from kvcar.text import token_windows

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, FIRST_SCORED = 320, 192

PROMPTS = {
    "okay repeated": " okay" * 400,
    "ha repeated": "ha" * 800,
    "zeros": "0" * 700,
    "one emoji": "😀" * 300,
    "five emoji": "😀😃😄😁😆" * 120,
    "white space": "\n    \n\t\t\n        \n" * 300,
    "digits": "".join(random.Random(0).choices("0123456789", k=900)),
    "base64": base64.b64encode(random.Random(1).randbytes(900)).decode(),
    "Chinese": "人工智能正在改变我们的生活方式，许多城市已经开始使用新的技术。" * 12,
    "URLs": "".join(f"https://www.example{i}.com/page/{i * 37}?q=a{i}&x=1 " for i in range(40)),
}


def texts_of_this_machine(tokenizer: Any) -> dict[str, str]:
    """Kinds of text that need no download: code of Python's library that no fit reads, its headers, and generated ones."""
    library, include = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))
    draw = random.Random(2)
    rows = [
        {"id": i, "name": f"user {i * 7 % 113}", "active": i % 3 == 0, "score": round(i * 1.37 % 17, 2), "zip": str(10000 + i * 37)}
        for i in range(600)
    ]  # fmt: skip
    logs = "".join(
        f"2024-05-{1 + i // 400:02d} {i // 60 % 24:02d}:{i % 60:02d}:{draw.randrange(60):02d} {draw.choice(('INFO', 'INFO', 'WARN'))} "
        f"[worker-{draw.randrange(8)}] GET /api/items/{draw.randrange(9999)} status={draw.choice((200, 200, 404))} ms={draw.randrange(400)}\n"
        for i in range(800)
    )
    sums = []
    for _ in range(120):
        a, b = draw.randrange(3, 94), draw.randrange(2, 85)
        sums.append({"role": "user", "content": f"What is {a} plus {b}? And what is {a} times {b}?"})
        sums.append({"role": "assistant", "content": f"{a} plus {b} is {a + b}, and {a} times {b} is {a * b}."})
    texts = {
        "Python": (library / "subprocess.py").read_text(encoding="utf-8"),
        "JSON": json.dumps(rows, indent=1),
        "logs": logs,
        "chat with sums": tokenizer.apply_chat_template(sums, tokenize=False),
    }
    headers = sorted(include.glob("*.h"))
    return texts | ({"C": "\n".join(path.read_text(encoding="utf-8") for path in headers[:40])} if headers else {})


def main(
    bundle: Path,
    name: Annotated[str, typer.Option(help="Of the record.")],
    model: str = "demo",
    text: Annotated[list[str] | None, typer.Option(help="KIND=FILE, besides what this machine has.")] = None,
    context: int = 2048,
    windows: int = 1,
) -> None:
    """Measure all kinds of text and all prompts; a record goes into ``results/``."""
    loaded, fitted = load_model(model), kvcar.Bundle.from_pretrained(bundle)
    texts = dict(each.split("=", 1) for each in text or [])
    given = {kind: kvcar.read_text(path).text for kind, path in texts.items()}
    kinds = {}
    with kvcar.attach(loaded.model, fitted):
        for kind, own in (given | texts_of_this_machine(loaded.tokenizer)).items():
            ids = token_windows(loaded.tokenizer, own, context, windows)
            kinds[kind] = fidelity_figures(_measured(loaded.model, fitted, ids))
            _tell(kind, kinds[kind])
    prompts = {}
    for kind, own in PROMPTS.items():
        ids = torch.tensor([loaded.tokenizer(own)["input_ids"][:PROMPT_TOKENS]])
        prompts[kind] = prompt_figures(loaded.model, fitted, ids)
        _tell(kind, prompts[kind])
    config = {
        "model": model, "name": name, "times_smaller": fitted.figures.get("times_smaller"), "context": context, "windows": windows,
        "fit": fitted.fit.model_dump(mode="json"), "max_page_cost": fitted.plan.cache.max_page_cost, "prompt_tokens": PROMPT_TOKENS,
        "first_scored": FIRST_SCORED, "codec_bytes": fitted.codec_bytes,
    }  # fmt: skip
    Record("kinds-of-text", {"kinds": kinds, "prompts": prompts}, config).write(RESULTS / f"kinds-of-text-{name}.json")


@torch.no_grad()
def prompt_figures(model: Any, bundle: kvcar.Bundle, ids: Tensor) -> dict[str, float]:
    """KL divergence and same top-1 of a prompt's last tokens, and the share of its finer pages."""
    full = torch.log_softmax(model(input_ids=ids).logits[0, FIRST_SCORED:].float(), -1)
    figures = {}
    with kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        parts = [model(input_ids=part, past_key_values=cache).logits[0] for part in ids.split(64, dim=1)]
        got = torch.log_softmax(torch.cat(parts)[FIRST_SCORED:].float(), -1)
        figures["kl_divergence"] = float((full.exp() * (full - got)).sum(-1).mean())
        figures["same_top"] = float((full.argmax(-1) == got.argmax(-1)).float().mean())
        figures["finer_page_share"] = cache.finer_page_share()
    return figures


def _measured(model: Any, bundle: kvcar.Bundle, ids: Tensor) -> Fidelity:
    return measure_fidelity(model, ids, {"bundle": lambda: kvcar.KVCarCache(bundle)})["bundle"]


def _tell(kind: str, figures: Mapping[str, Any]) -> None:
    print(f"{kind}: KL {figures['kl_divergence']:.5f}, finer {100 * figures['finer_page_share']:.1f} %", flush=True)


if __name__ == "__main__":
    typer.run(main)
