"""``docs/results/tests.md`` from the records of ``transformers_tests.py``, ``fuzz.py`` and ``soak.py``. Called by ``tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_HEAD = """# Tests of others, and files of strangers

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`."""

_TESTS = """## transformers' own tests of caches and generation

The tests of transformers' repository, with the tiny random Llama and GPT-2 that they make, run over `KVCarCache` with a bundle that
loses nothing and puts every token into pages at once (`benchmarks/transformers_tests.py`). Masks that the tests draw at random are made to
mean padding on the left, attention weights are not asked for, and where a test looks up tensors in a cache's layers, what the pages hold is
looked at instead. A test that fails is run again without kvcar; one that fails then too says nothing about it, and is counted apart."""

_FUZZ = """## Files changed at random

Bundles and stored contexts of every structure, changed at random with all checksums made anew (`benchmarks/fuzz.py`). Each must be refused
by one of kvcar's own errors, or load and go on with finite logits, within {seconds} s of the processor and {memory} MiB."""


_SOAK = """## Used for long

`benchmarks/soak.py`: requests in the README's form, several threads that generate on one attached model, and random operations on
caches, each beside one of transformers that has seen the same. Tiny random models. A run ends at the first fault: another text, an error that should
not be, or logits apart by more than 2e-5 of their size without loss and 0.6 of it in 8 bits, where many latents of random weights are far
from what a fit saw. Those below came to their end."""


def tests_page() -> str:
    """The page, whatever records there are of it."""
    sections = [
        _HEAD,
        *map(_tests, load("transformers-tests*.json", "transformers-tests")),
        *_fuzz(load("fuzz*.json", "fuzz")),
        *_soak(),
    ]
    return "\n\n".join(sections) + "\n"


def _tests(r: dict[str, Any]) -> str:
    alike = sum(1 for each in r["tests"] if _fails_alike(each))
    counts, versions = r["counts"], (r["config"]["tests_of_version"], r["provenance"]["transformers"])
    lines = [
        _TESTS,
        f"Tests of transformers {versions[0]}, run with transformers {versions[1]}: {counts['passed'] - alike} pass, {counts['failed']} fail, {alike} fail "
        "without kvcar in the same words, "
        f"{counts['not applicable']} do not apply. Record: `{r['record']}`.",
    ]
    rows = [["test", "result", "reason"]]
    for each in sorted(
        r["tests"], key=lambda each: (each["result"] == "not applicable", each["result"] == "passed", each["test"])
    ):
        result = "fails without kvcar too" if _fails_alike(each) else each["result"]
        rows.append([f"`{_short(each['test'])}`", result, each["reason"].replace("|", "\\|")])
    return "\n\n".join([*lines, markdown(rows)])


def _fails_alike(test: dict[str, Any]) -> bool:
    """Whether a test fails with kvcar as it does without; the record counts it as passed, with the reason."""
    return test["result"] == "passed" and bool(test["reason"])


def _short(test: str) -> str:
    """Name a test without the folders of its file."""
    path, _, rest = test.partition("::")
    return f"{path.rpartition('/')[2].removesuffix('.py')} {rest.replace('::', ' ')}"


def _fuzz(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    limits = records[0]["config"]
    rows = [["record", "kind", "seeds", "refused", "work", "faults", "slowest", "largest growth"]]
    for r in records:
        for kind in (kind for kind in ("bundle", "context") if kind in r):
            found, first = r[kind], r["config"]["first_seed"]
            faults = len(found["faults"])
            rows.append(
                [
                    f"`{r['record']}`", kind, f"{first:,} to {first + found['cases'] - 1:,}", f"{sum(found['refused'].values()):,}",
                    f"{found['works']:,}", f"{faults:,}", f"{found['slowest_seconds']:.1f} s", f"{found['largest_growth_bytes'] / 1e6:.0f} MB",
                ]
            )  # fmt: skip
    intro = _FUZZ.format(seconds=limits["limit_seconds"], memory=limits["limit_memory_bytes"] >> 20)
    return [intro, markdown(rows)]


def _soak() -> list[str]:
    """What records there are of the three."""
    lines = [
        *(f"- {_requests(r)} Record: `{r['record']}`." for r in load("soak-requests*.json", "soak-requests")),
        *(f"- {_threads(r)} Record: `{r['record']}`." for r in load("soak-threads*.json", "soak-threads")),
        *(f"- {_operations(r)} Record: `{r['record']}`." for r in load("soak-operations*.json", "soak-operations")),
    ]
    return [_SOAK, "\n".join(lines)] if lines else []


def _requests(r: dict[str, Any]) -> str:
    return f"{r['requests']:,} requests after {r['config']['warm_up']} others: memory grew by {r['growth_bytes'] / 1e6:.2f} MB."


def _threads(r: dict[str, Any]) -> str:
    right = r["right"]
    return (
        f"{r['runs']} texts in {r['config']['workers']} threads, {r['rounds']} times over: {sum(right):,} of "
        f"{r['runs'] * r['rounds']:,} are those that one thread alone gives."
    )


def _operations(r: dict[str, Any]) -> str:
    worst = "; ".join(f"{name} {difference:.1g}" for name, difference in r["largest_difference"].items())
    grown = [r[f"{kind}_growth_bytes_per_1000_operations"] / 1e6 for kind in ("resident", "allocated")]
    return (
        f"{r['operations']:,} operations in {r['config']['minutes']:.0f} minutes (seed {r['config']['seed']}): memory in use grew by "
        f"{grown[1]:.2f} MB per 1,000 of them (with what the allocator keeps, {grown[0]:.2f} MB); largest differences of logits, as a "
        f"share of their size: {worst}."
    )
