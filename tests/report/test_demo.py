"""The demo from the fit to its page, with a tiny model in the place of the demo model."""

import json
import re

import pytest
from commands import run
from tiny import VOCABULARY, tiny_model

import kvcar.report.demo as demo
from kvcar.bundle import Bundle
from kvcar.models.load import LoadedModel


class Characters:
    """A tokenizer of a character each, with a chat template."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}

    def decode(self, ids, **options):
        return "".join(chr(97 + int(token) % 26) for token in ids)

    def apply_chat_template(self, messages, **options):
        import torch

        return {"input_ids": torch.tensor([self(messages[0]["content"])["input_ids"]])}


@pytest.fixture
def small(monkeypatch):
    loaded = LoadedModel(tiny_model("llama"), Characters(), "demo")
    monkeypatch.setattr(demo, "load_model", lambda *given, **options: loaded)
    for name, value in {
        "_FIT_TOKENS": 3072, "_EFFECT_TOKENS": 512, "_EVAL_CONTEXT": 300, "_PROMPT_TOKENS": 150,
        "_NEW_TOKENS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)


def test_the_demo_measures_two_kinds_of_text_and_counts_its_codecs(small, tmp_path):
    printed = run("demo", "-o", tmp_path)
    assert "argparse.py" in printed
    bundle = Bundle.from_pretrained(tmp_path / "bundle-5x")
    assert bundle.fit.options["profile"] in (None, "balanced"), "as kvcar fit by default"
    assert f"codecs take {bundle.codec_bytes:,} bytes" in " ".join(printed.split())
    page = (tmp_path / "index.html").read_text()
    numbers = {int(found.replace(",", "")) for found in re.findall(r"<td>([\d,]+)</td>", page)}
    assert any(bundle.codec_bytes <= number < 3 * bundle.codec_bytes for number in numbers), (
        "codecs as they lie in memory"
    )
    for shown in ("Q4_1", "Python code", "held out of the fit", "pays from (tokens)"):
        assert shown in page
    texts = {}
    for kind in ("english", "code"):
        for name in ("identity", "5x"):
            record = json.loads((tmp_path / f"fidelity-{kind}-{name}.json").read_text())
            texts[kind] = record["config"]["text"]
            assert record["kl_divergence"] < 1e-6 if name == "identity" else record["kl_divergence"] > 1e-6
    assert texts["english"] != texts["code"]
    assert bundle.figures["held_out"]["kl_divergence"] > 0
    assert json.loads((tmp_path / "generation-full.json").read_text())["new_tokens"] == 4
