"""What a fit and an evaluation are given is looked at before any work is done."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.errors import AttachError, BundleError, InputError, PlanError

WINDOWS = token_ids(256, batch=16)
WRONG = {
    "fractions": WINDOWS.float(),
    "truth values": WINDOWS > 5,
    "beyond the vocabulary": WINDOWS + 100,
    "negative": WINDOWS - 50,
    "a list": WINDOWS.tolist(),
    "one axis": WINDOWS[0],
    "nothing": WINDOWS[:0],
}


@pytest.mark.parametrize("token_ids", WRONG.values(), ids=WRONG)
def test_token_ids_that_are_none(token_ids):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="token_ids must be"):
        kvcar.fit(model, token_ids=token_ids)
    with pytest.raises(InputError, match="token_ids must be"):
        kvcar.evaluate(model, kvcar.lossless(model), token_ids=token_ids)


def test_an_attached_model_is_refused_before_the_fit():
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)), pytest.raises(AttachError, match="detach it first"):
        kvcar.fit(model, token_ids=WINDOWS)


def test_overwriting_deletes_nothing_that_is_not_a_bundles(tmp_path):
    bundle = fitted(tiny_model("llama"), times_smaller=3)
    bundle.save_pretrained(tmp_path / "b")
    bundle.save_pretrained(tmp_path / "b", overwrite=True)
    (tmp_path / "b" / "mine.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"mine\.txt"):
        bundle.save_pretrained(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "mine.txt").read_text() == "precious"


def test_geometries_of_no_model_are_refused_before_they_take_memory():
    bundle = fitted(tiny_model("llama"), times_smaller=3)
    data = bundle.plan.model_dump(mode="json")
    data["geometry"]["layers"] = 10**9
    with pytest.raises(PlanError, match="layers"):
        kvcar.Plan.from_data(data)


def test_a_fit_in_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        assert kvcar.fit(model, token_ids=WINDOWS, times_smaller=3, check=False).plan.blocks
