"""Options of a wrong type are refused by name, with kvcar's own errors, wherever the Python path takes them."""

import pytest
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.errors import KVCarError, PlanError
from kvcar.models.load import LoadedModel
from kvcar.plan import Reuse

WINDOWS = token_ids(256, batch=16)
KEY = (1, 0, "key")


class Characters:
    """A tokenizer of a character each."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def bundle(model):
    return fitted(model, bits=3)


WRONG_FITS = [
    {"times_smaller": "8"}, {"times_smaller": True}, {"times_smaller": float("nan")}, {"max_kl": "a"}, {"profile": 3},
    {"structure": {"bits": 3}}, {"window": "64"}, {"cache": 64}, {"seed": "x"}, {"effect_tokens": 1.5}, {"name": 5},
]  # fmt: skip


@pytest.mark.parametrize("given", WRONG_FITS, ids=str)
def test_fits(model, given):
    (name,) = given
    with pytest.raises(KVCarError, match=name):
        kvcar.fit(model, token_ids=WINDOWS, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"bits": "3"}, {"layers_per_block": 1.5}, {"heads_per_block": "1"}, {"layers": 3}, {"layers": ("a",)},
        {"reuses": 5}, {"reuses": ((0, 0),)}, {"steps": None}, {"latent_bits": None}, {"codec": None}, {"metric": 1},
    ],
    ids=str,
)  # fmt: skip
def test_structures(given):
    (name,) = given
    with pytest.raises(KVCarError, match=name):
        kvcar.Structure(**given)


@pytest.mark.parametrize("slot", [5, (0, 0), (0, 0, "x"), ("0", 0, "key")])
def test_reuses(model, slot):
    with pytest.raises(KVCarError, match="source of a reuse: a slot is"):
        Reuse(slot=KEY, source=slot)


@pytest.mark.parametrize(
    "pairs", [[((99, 0, "key"), KEY)], [(KEY, (99, 0, "key"))], [((2, 0, "key"), KEY), (KEY, (2, 0, "key"))]], ids=str
)
def test_reuses_that_the_model_cannot_have(model, pairs):
    structure = kvcar.Structure(reuses=tuple(Reuse(slot=slot, source=source) for slot, source in pairs))
    with pytest.raises(PlanError, match="slot"):
        kvcar.fit(model, token_ids=WINDOWS, structure=structure)


CALLS = {
    "progress": lambda m, b: kvcar.fit(m, token_ids=WINDOWS, on_progress=5),
    "progress of an evaluation": lambda m, b: kvcar.evaluate(m, b, token_ids=WINDOWS, on_progress=5),
    "a text": lambda m, b: kvcar.fit(m, Characters(), 5),
    "texts": lambda m, b: kvcar.fit(m, Characters(), [5]),
    "tokens": lambda m, b: kvcar.fit(m, Characters(), "abc" * 3000, tokens="4"),
    "a tokenizer": lambda m, b: kvcar.fit(m, "tokenizer", "abc" * 3000),
    "a name for a model": lambda m, b: kvcar.fit("demo", Characters()),
    "what load_model gave": lambda m, b: kvcar.fit(LoadedModel(m, None, "x"), Characters()),
    "options that are no list": lambda m, b: kvcar.fit_bundles(m, WINDOWS, kvcar.FitOptions()),
    "other options": lambda m, b: kvcar.fit_bundles(m, WINDOWS, [5]),
    "lossless": lambda m, b: kvcar.lossless("demo"),
    "attach": lambda m, b: kvcar.attach("demo", b),
    "attach a number": lambda m, b: kvcar.attach(m, 5),
    "attach nothing": lambda m, b: kvcar.attach(m, None),
    "detach": lambda m, b: kvcar.detach("demo"),
    "evaluate": lambda m, b: kvcar.evaluate("demo", b, Characters()),
    "context": lambda m, b: kvcar.evaluate(m, b, Characters(), "abc" * 3000, context="x"),
    "windows": lambda m, b: kvcar.evaluate(m, b, Characters(), "abc" * 3000, windows=2.5),
    "token windows": lambda m, b: kvcar.token_windows(Characters(), "abc" * 3000, "10", 2),
    "token windows of a number": lambda m, b: kvcar.token_windows(Characters(), 5, 10, 2),
    "load_model": lambda m, b: kvcar.load_model(5),
    "from_pretrained": lambda m, b: kvcar.Bundle.from_pretrained(5),
    "save_pretrained": lambda m, b: b.save_pretrained(5),
    "KVCarCache": lambda m, b: kvcar.KVCarCache(5),
    "load": lambda m, b: kvcar.KVCarCache.load(5, m),
    "read_context": lambda m, b: kvcar.read_context(5),
    "measure_fidelity": lambda m, b: kvcar.measure_fidelity(m, [1, 2], {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(model, bundle, call):
    with pytest.raises(KVCarError, match="got"):
        call(model, bundle)


def test_help_shows_functions_with_their_parameters():
    import pydoc

    for function, parameters in ((kvcar.fit, ("times_smaller", "max_kl")), (kvcar.evaluate, ("context", "windows"))):
        shown = pydoc.plain(pydoc.render_doc(function))
        assert "Raises:" in shown
        for name in parameters:
            assert f"    {name}: " in shown.split("Args:")[0]


def test_bundles_and_figures_are_shown_in_a_line(model, bundle):
    found = kvcar.evaluate(model, bundle, token_ids=token_ids(150, batch=2))
    for each, part in ((bundle, "codecs of"), (found, "KL divergence")):
        assert part in repr(each)
        assert len(repr(each)) < 300
