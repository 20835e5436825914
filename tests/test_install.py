"""The core needs five packages; what an extra brings is asked for in one plain line."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXTRAS = (
    "accelerate", "constriction", "gguf", "hqq", "lm_eval", "matplotlib", "optimum", "rich", "triton", "typer", "zstandard"
)  # fmt: skip

CORE = """
import kvcar
from tiny import tiny_model, token_ids

model = tiny_model("llama")
bundle = kvcar.fit(model, token_ids=token_ids(256, batch=8), times_smaller=3, check=False)
with kvcar.attach(model, bundle) as attached:
    cache = attached.new_cache()
    model.generate(token_ids(200), past_key_values=cache, max_new_tokens=5)
print(cache.pages, kvcar.evaluate(model, bundle, token_ids=token_ids(256)).kl_divergence.value < 1)
"""


def run_without(packages, code):
    """Run ``code`` in a process in which none of ``packages`` is installed."""
    missing = f"import sys; sys.path.insert(0, {str(TESTS)!r}); sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run([sys.executable, "-c", missing + code], capture_output=True, text=True)


def test_the_core_fits_attaches_generates_and_measures_without_any_extra():
    result = run_without(EXTRAS, CORE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "True"]


@pytest.mark.parametrize("start", ["from kvcar.cli import main; main()", "import runpy; runpy.run_module('kvcar')"])
def test_the_command_says_in_one_line_what_to_install(start):
    result = run_without(("typer", "rich"), start)
    assert result.returncode == 1
    assert result.stderr == "kvcar's command line needs the package typer; install it with: pip install 'kvcar[cli]'\n"
