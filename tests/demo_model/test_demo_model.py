"""The whole of it on the real demo model, on text that every machine has; downloads the model once."""

import json

import pytest
from peak_memory import measure_peak_growth
from typer.testing import CliRunner

from kvcar.cli import app
from kvcar.models.load import load_model
from kvcar.text import evaluation_texts, token_windows

pytestmark = pytest.mark.demo_model


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "5x"
    run(
        "fit-structure",
        "demo",
        "-o",
        folder,
        "--times-smaller",
        5,
        "--layers-per-block",
        5,
        "--tokens",
        10240,
        "--no-check",
    )
    return folder


def test_five_times_smaller_says_nearly_the_same(bundle, tmp_path):
    figures = tmp_path / "figures.json"
    run("eval", "demo", "--bundle", bundle, "--context", 1024, "--windows", 1, "--json", figures)
    data = json.loads(figures.read_text())
    assert data["kl_divergence"] < 0.02
    assert data["same_top"] > 0.93
    assert data["perplexity"] < 1.03 * data["perplexity_full"]
    # 128 of the 1,024 tokens are sinks, window and room: at 4,096 tokens it is 5 times.
    assert data["times_smaller"] > 3.8


def test_a_question_is_answered_from_what_lies_in_pages(bundle, tmp_path):
    loaded = load_model("demo")
    excerpt = loaded.tokenizer.decode(token_windows(loaded.tokenizer, evaluation_texts(None)[0].text, 300, 1)[0])
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"The name of my cat is Marzipan.\n\n{excerpt}\n\nWhat is the name of my cat?", encoding="utf-8")
    output = run("generate", "demo", "--bundle", bundle, "--chat", "--prompt-file", prompt, "--max-new-tokens", 24)
    assert "Marzipan" in output


def test_memory_is_really_saved(bundle):
    """Peak growth of a 4,000-token run, prefill included, each in a process of its own.

    Of memory in use: what the allocator keeps besides is 30 to 50 MB here, and differs from run to run.
    """
    full = measure_peak_growth("demo", None, 4000, decode_tokens=4, in_use_only=True)
    small = measure_peak_growth("demo", bundle, 4000, decode_tokens=4, in_use_only=True)
    assert full.tokens == small.tokens == 4000
    assert full.cache_bytes == 4000 * 30 * 2 * 3 * 64 * 4
    assert full.cache_bytes > 2 * 4.5 * small.cache_bytes, "the model runs in float32, the target is against bfloat16"
    assert small.peak_growth_bytes < 0.4 * full.peak_growth_bytes
