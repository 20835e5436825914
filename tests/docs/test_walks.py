"""The walks of docs/how-it-works.md are taken, and pass the functions that it names in its order."""

import re
import sys
from pathlib import Path

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.kernels.native import find_compiler

PACKAGE = Path(kvcar.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d\. `([\w/.]+)` `([\w.]+)`:", re.MULTILINE)
WALKS = {title: STEP.findall(body) for title, body in re.findall(r"^### (.+?)\n(.*?)(?=^###|\Z)", PAGE, re.M | re.S)}
LONGEST = 6


def calls_of(run):
    """Functions of the package that ``run`` calls, as (file, qualified name), in the order of their calls."""
    called = []

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            called.append((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def attached(model):
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached:
        yield attached


@torch.no_grad()
def decode_step(model, attached, tmp_path):
    cache = attached.new_cache()
    model(input_ids=token_ids(100), past_key_values=cache)
    return calls_of(lambda: model(input_ids=token_ids(1), past_key_values=cache))


def chunk(model, attached, tmp_path):
    return calls_of(lambda: model.generate(token_ids(100), max_new_tokens=1))


@torch.no_grad()
def page(model, attached, tmp_path):
    cache = attached.new_cache()

    def run():
        for _ in range(2):
            model(input_ids=token_ids(100), past_key_values=cache)

    return calls_of(run)


def plan(model, attached, tmp_path):
    other = tiny_model("llama")

    def run():
        bundle = kvcar.fit(other, token_ids=token_ids(256, batch=12), times_smaller=3)
        bundle.save_pretrained(tmp_path / "bundle")
        kvcar.attach(other, kvcar.Bundle.from_pretrained(tmp_path / "bundle"))

    return calls_of(run)


TAKEN = {
    "A key in a decode step": decode_step,
    "A chunk of a prompt": chunk,
    "A page, written and read": page,
    "A plan, from fit to cache": plan,
}


def test_all_walks_are_taken():
    assert list(WALKS) == list(TAKEN)


@pytest.mark.skipif(find_compiler() is None, reason="the walks are those of a CPU with a C compiler")
@pytest.mark.parametrize("title", TAKEN)
def test_a_walk_passes_the_functions_that_the_page_names(title, model, attached, tmp_path):
    steps, called = WALKS[title], TAKEN[title](model, attached, tmp_path)
    assert len(steps) > 3
    assert len({file for file, _ in steps}) <= LONGEST
    rest = iter(called)
    for step in steps:
        assert step in rest, f"{step} is not called, or not after what stands before it"
