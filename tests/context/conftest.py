"""A tiny model with its bundle, and a context that its cache wrote."""

import pytest
from bundles import fitted
from containers import filled
from tiny import tiny_model, token_ids

import kvcar
from kvcar.context import save_context


@pytest.fixture(scope="session")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=4, layers_per_block=2)


@pytest.fixture(scope="session")
def saved_bytes(llama, tmp_path_factory):
    model, bundle = llama
    path = tmp_path_factory.mktemp("saved") / "a.ctx"
    with kvcar.attach(model, bundle):
        save_context(filled(model, bundle, token_ids(150)), path, token_ids=token_ids(150))
    return path.read_bytes()


@pytest.fixture
def saved(saved_bytes, tmp_path):
    """A context of 150 tokens with its token ids, to be changed at will."""
    path = tmp_path / "a.ctx"
    path.write_bytes(saved_bytes)
    return path
