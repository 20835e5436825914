"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os

import pytest
import torch

# Loading by a hub id must fail at once in tests, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton's kernels run under its interpreter where there is no GPU; it looks when it is imported, by whomever.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kvcar.kernels.attend import cpu  # what it imports reads the variables above

pytest_plugins = ["commands"]  # its fixtures: a tiny model in a folder, a text, a bundle


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request):
    """Tiny tensors gain nothing from threads and lose much where another process is busy; the demo model has its share."""
    threads = torch.get_num_threads()
    share = max(1, threads // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(share if request.node.get_closest_marker("demo_model") else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def decoders_in_float(request, monkeypatch):
    """The C kernel rounds decoders of keys to 8 bits, which its own tests are about; elsewhere results are compared closely."""
    if not request.node.get_closest_marker("demo_model"):
        monkeypatch.setattr(cpu, "IN_8_BITS", False)
