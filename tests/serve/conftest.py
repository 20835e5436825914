"""A tiny Llama with its keys and values, and a record of its first page."""

import pytest
import torch
from record_pages import BUNDLES, coder_of, keys_of, model_and_sides

from kvcar.serve.records import encode_record


@pytest.fixture(scope="session")
def llama():
    return model_and_sides()


@pytest.fixture(scope="session")
def coder(llama):
    return coder_of(llama[0], BUNDLES["fitted"](llama[0]))


@pytest.fixture(scope="session")
def key(llama, coder):
    return keys_of(coder, llama[1])[0]


@pytest.fixture(scope="session")
def record(llama, coder, key):
    return encode_record(coder, *(side[:, :, :256] for side in llama[2:]), key)


@pytest.fixture(scope="session")
def noise():
    """Keys and values that no model gives."""
    return torch.randn(2, 4, 2, 256, 16, generator=torch.Generator().manual_seed(3)).unbind(0)
