"""The registry of kernels: which implementation runs, what is logged, and that all of them compute the same."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from structures import STRUCTURES, paged_past
from triton_device import DEVICE

from kvcar.cache.coder import PageCoder
from kvcar.errors import InputError, KernelError
from kvcar.kernels import backend
from kvcar.kernels.attend import ATTENTION, Buffered, ExactPast, attend, case_of, naive
from kvcar.kernels.encode import ENCODING
from kvcar.kernels.native import find_compiler
from kvcar.kernels.pack import PACKING, UNPACKING
from kvcar.kernels.rotary import RotaryTable

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def rotary(device="cpu"):
    return RotaryTable(1.0 / 10000 ** (torch.arange(8, dtype=torch.float64, device=device) / 8), 1.0, "half")


@pytest.fixture
def new_choice():
    def forget():
        backend._backend.cache_clear()
        backend._log_fallback.cache_clear()

    forget()
    yield
    forget()


# Implementations


@pytest.mark.parametrize(("name", "case"), list(ATTENTION.importable()))
def test_every_implementation_of_attention_is_the_specification(name, case):
    """With buffered tokens before the pass, as caches give them: all take the same inputs."""
    if name == "cpu" and not find_compiler():
        pytest.skip("needs a C compiler")
    device = DEVICE if name == "triton" else "cpu"
    count = {"step": 2, "chunk": 50}[case]
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device(device), torch.float32)
    paged = paged_past(coder, 0, 200, 2, rotary(device), [0, 5])
    room, new = torch.randn(2, 2, 2, 40, 16, device=device), torch.randn(2, 2, 2, count, 16, device=device)
    exact = ExactPast(new[0], new[1], None, Buffered(room[0], room[1], 3, 20))
    query = torch.randn(2, 4, count, 16, device=device)
    assert case_of(query, 2) == case
    own = ATTENTION.find(name, case)
    assert own.unsupported is None or own.unsupported(query, paged) is None
    assert ATTENTION.choose(name, case, query, paged) is own.run
    expected = naive.attend(query, exact, paged, 0.25)
    torch.testing.assert_close(own.run(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(attend(query, exact, paged, 0.25, backend=name), expected, atol=2e-5, rtol=2e-5)


def test_steps_and_chunks_are_told_apart_by_query_rows():
    for heads, tokens, case in [(2, 1, "step"), (400, 1, "step"), (2, 64, "step"), (8, 16, "step"), (8, 17, "chunk")]:
        assert case_of(torch.empty(1, heads, tokens, 4), 2) == case
    assert case_of(torch.empty(1, 2, 1, 4), 2, has_pages=False) == "chunk"


def test_every_implementation_is_documented():
    text = DOCS.read_text()
    for operation in (ATTENTION, ENCODING, PACKING, UNPACKING):
        for name, case in operation.importable():
            row = f"| {operation.name} | {case if case != 'any' else ''} | `{name}` |".replace("|  |", "| |")
            assert row in text, row


def test_a_new_kernel_is_one_new_file(tmp_path, monkeypatch, new_choice, caplog):
    (tmp_path / "newcomers").mkdir()
    (tmp_path / "newcomers" / "__init__.py").write_text(
        "from kvcar.kernels.backend import Operation\n"
        "DOUBLING = Operation('doubling', __name__)\n"
        "DOUBLING.register('torch')(lambda x: x + x)\n"
    )
    (tmp_path / "newcomers" / "cpu.py").write_text(
        "from . import DOUBLING\n"
        "@DOUBLING.register('cpu', unsupported=lambda x: 'it is negative' if x < 0 else None)\n"
        "def double(x):\n"
        "    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from newcomers import DOUBLING

        assert list(DOUBLING.implementations) == [("torch", "any")]
        assert DOUBLING.choose("cpu", "any", 3).__name__ == "double"
        assert DOUBLING.choose("triton", "any", 3)(3) == 6
        with caplog.at_level(logging.INFO, "kvcar.kernels"):
            for _ in range(2):
                assert DOUBLING.choose("cpu", "any", -3)(-3) == -6
        assert [record.getMessage() for record in caplog.records] == [
            "doubling: PyTorch, as the cpu kernel does not support this: it is negative"
        ]
    finally:
        for name in [name for name in sys.modules if name.startswith("newcomers")]:
            del sys.modules[name]


def test_a_chunk_is_no_refusal(new_choice, monkeypatch, caplog):
    if not find_compiler():
        pytest.skip("needs a C compiler")
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 100, 1, rotary(), [0])
    exact = ExactPast(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), None)
    with caplog.at_level(logging.INFO, "kvcar.kernels"):
        attend(torch.randn(1, 4, 40, 16), exact, paged, 0.25)
    assert "does not support" not in caplog.text


# Backends


def test_the_default_on_a_cpu_with_a_compiler_is_c(new_choice, monkeypatch, caplog):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, "kvcar.kernels"):
        assert backend.backend_for(torch.device("cpu")) == "cpu"
    assert find_compiler().version in caplog.text


def test_without_a_compiler_it_is_pytorch_and_said_so(new_choice, monkeypatch, caplog):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "find_compiler", lambda: None)
    assert backend.backend_for(torch.device("cpu")) == "torch"
    assert "no C compiler" in caplog.text


def test_a_choice_that_cannot_be_is_refused(new_choice, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(InputError, match="must be one of naive, torch, cpu, triton"):
        backend.backend_for(torch.device("cpu"))
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(KernelError, match="the model is on cuda"):
        backend.backend_for(torch.device("cuda"))


@pytest.mark.parametrize("name", ["naive", "torch", "cpu"])
def test_the_variable_decides(new_choice, monkeypatch, name, caplog):
    coder = PageCoder(STRUCTURES["autoencoder"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 100, 1, rotary(), [0])  # packed by the default backend, which is logged too
    monkeypatch.setenv(backend.VARIABLE, name)
    query, exact = torch.randn(1, 4, 1, 16), ExactPast(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), None)
    with caplog.at_level(logging.INFO, "kvcar.kernels"):
        got = attend(query, exact, paged, 0.25)
    assert f"kernels on cpu: {name}" in caplog.text
    assert ("does not support this: a codec is not affine" in caplog.text) == (name == "cpu")
    torch.testing.assert_close(got, naive.attend(query, exact, paged, 0.25), atol=2e-5, rtol=2e-5)
