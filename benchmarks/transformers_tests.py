"""transformers' own tests of caches and generation, run over kvcar's caches with a bundle that loses nothing.

python benchmarks/transformers_tests.py CHECKOUT

CHECKOUT is one of https://github.com/huggingface/transformers, at the tag of the version that is installed; nothing of it is
kept. Tests that fail are run again without kvcar: those that fail then too say nothing about it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TESTS = (
    "tests/utils/test_cache_utils.py",
    "tests/models/llama/test_modeling_llama.py",
    "tests/models/gpt2/test_modeling_gpt2.py",
    "tests/generation/test_utils.py",
)

_WITHOUT_A_MODEL = {
    "CacheTest": "puts tensors into transformers' own caches by hand",
    "SyntheticCacheTest": "puts tensors into transformers' own caches by hand",
    "CacheCroppingTests": "puts tensors into transformers' own caches by hand",
    "UtilsFunctionsTest": "computes with logits alone",
    "TestAssistedCandidateGeneratorDifferentTokenizers": "compares token ids of two tokenizers",
    "TestAssistedCandidateGeneratorUpdateStrategy": "counts candidates from scores alone",
    "CacheExportIntegrationTest": "exports a model with a cache that is made while it is traced",
    "TokenHealingTestCase": "leaves nothing to generate",
    "test_generate_from_inputs_embeds": "is the name of a test with parameters, and empty",
    "test_hub_gen_strategies": "is the name of a test with parameters, and empty",
    "test_prompt_lookup_decoding_no_eos_token": "looks for candidates in token ids alone",
    "test_inherits_generation_mixin": "looks at the classes of models",
    "test_prepare_inputs_for_generation_kwargs_forwards": "prepares inputs for a pass that is not run",
    "test_prompt_lookup_decoding_matches_greedy_search": "never runs, with kvcar or without: its decorator lacks its parentheses",
    "test_prompt_lookup_decoding_stops_at_eos": "looks for candidates in token ids alone",
    "test_eager_padding_matches_padding_free_with_position_ids": "runs passes without a cache",
    "test_sdpa_padding_matches_padding_free_with_position_ids": "runs passes without a cache",
    "test_forward_with_logits_to_keep": "runs a pass without a cache",
}
"""Why no pass over a cache is run, by class or test."""


def run(checkout: Path, tests: list[str], plain: bool) -> dict[str, dict[str, Any]]:
    """Run tests, with kvcar's caches unless ``plain``; by name what came of each."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "outcomes.json"
        paths = [str(HERE), str(HERE.parent / "src"), str(checkout), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1", "KVCAR_OUTCOMES": str(output), "KVCAR_PLAIN": str(int(plain)),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "transformers_plugin", *tests]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        return json.loads(output.read_text(encoding="utf-8"))


def judged(test: str, found: dict[str, Any], without: dict[str, Any] | None) -> tuple[str, str]:
    """What to write of a test: passed, failed or not applicable, and the reason.

    Args:
        test: its name.
        found: with kvcar.
        without: without it, where it was run again.
    """
    if found["outcome"] == "passed":
        return ("passed", "") if found["passes"] else ("not applicable", _no_pass(test))
    if found["outcome"] == "skipped":
        return "not applicable", f"skipped by itself: {found['reason']}"
    if without is not None and without["outcome"] != "passed":
        other_words = found["reason"].startswith("AssertionError") and "!=" in found["reason"]
        if found["passes"] and other_words and found["text"] == without["text"]:
            return (
                "passed",
                "expects the words of the checkpoint that it names; the model here says others, without kvcar the same",
            )
        return "not applicable", f"fails without kvcar too: {without['reason']}"
    if found["outcome"] == "refused":
        return "not applicable", f"refused: {found['reason'].partition(': ')[2]}"
    return "failed", found["reason"]


def _no_pass(test: str) -> str:
    """Why a test that passed says nothing."""
    _, owner, name = test.rsplit("::", 2)
    return (
        _WITHOUT_A_MODEL.get(name)
        or _WITHOUT_A_MODEL.get(owner)
        or "asks for another cache, which an attached model gives it"
    )


def main(
    checkout: Annotated[Path, typer.Argument(help="Of transformers' repository, at the tag of the version installed.")],
    name: str = "transformers-tests",
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
    only: Annotated[list[str] | None, typer.Option(help="Tests to run instead of all.")] = None,
) -> None:
    """Run the tests and write the record."""
    found = run(checkout, list(only or TESTS), plain=False)
    again = [test for test, each in found.items() if each["outcome"] in ("failed", "refused")]
    without = run(checkout, again, plain=True) if again else {}
    tests, counts = [], {"passed": 0, "failed": 0, "not applicable": 0}
    for test, each in found.items():
        result, reason = judged(test, each, without.get(test))
        counts[result] += 1
        tests.append({"test": test, "result": result, "reason": reason, "passes": each["passes"]})
    from kvcar.record import Record

    version = next(
        (
            line.partition('"')[2].strip('"\n')
            for line in (checkout / "src/transformers/__init__.py").read_text(encoding="utf-8").splitlines()
            if line.startswith("__version__")
        ),
        "unknown",
    )
    config = {
        "tests_of_version": version,
        "window": 0,
        "page_tokens": 32,
    }
    output.mkdir(exist_ok=True)
    Record("transformers-tests", {"counts": counts, "tests": tests}, config).write(output / f"{name}.json")
    print(counts)
    for each in tests:
        if each["result"] == "failed":
            print(each["test"], each["reason"])


if __name__ == "__main__":
    typer.run(main)
