"""Rival methods: bytes by formula against bytes really packed, an exact method against the full cache, known errors."""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from baselines import BASELINES, BaselineCache, Calibration, Method, Places, Stored
from baselines.fisher import fisher_of_blocks, share_ranks
from baselines.groups import Group, _choices, _partition, allocate_groups
from baselines.kivi import AS_PAPER, Kivi
from baselines.kvtc import Kvtc
from baselines.kvtc import fit as fit_kvtc
from baselines.palu import fit as fit_palu
from baselines.stored import Codes
from baselines.turboquant import TurboQuant, lloyd_max, random_rotation, sphere_codebook
from baselines.uniform import dequantise, quantise
from tiny import tiny_model, token_ids

from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.fit.partition import regular_blocks

LAYERS, HEADS, DIM = 4, 2, 16


class Exact(Method):
    """Gives back what it was given; counts nothing."""

    family = "exact"

    def __init__(self, keys_before_rope=False):
        self.keys_before_rope = keys_before_rope
        self.seen = []

    def encode(self, kind, x):
        self.seen.append((kind, tuple(x.shape)))
        self._held = x.clone()
        return Stored()

    def decode(self, kind, stored):
        return self._held


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def calibration(model):
    return Calibration(model, token_ids(256, batch=8, seed=7))


def cache_of(method, calibration):
    return BaselineCache(method, calibration.geometry, calibration.rotary)


def vectors(tokens=64, seed=0):
    return torch.randn(LAYERS, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "chunk"), [("llama", 7), ("llama", 64), ("gpt2", 50), ("gemma3", 50)])
def test_an_exact_method_reads_like_the_full_cache(family, chunk):
    model = tiny_model(family)
    own = Calibration(model, token_ids(64))
    caches = {str(before): (lambda b=before: cache_of(Exact(b), own)) for before in (False, True)}
    results = measure_fidelity(model, token_ids(150), caches, chunk=chunk)
    assert results["False"].kl_divergence.value == 0.0
    assert results["True"].kl_divergence.value < 1e-6, "rotating back and forth costs rounding only"


def test_tokens_leave_for_all_layers_at_once_and_only_they_change(model, calibration):
    method = Exact()
    method.decode = lambda kind, stored: torch.zeros_like(method._held)
    cache = cache_of(method, calibration)
    with torch.no_grad():
        for part in token_ids(200).split(100, dim=1):
            model(part, past_key_values=cache)
    cache.stored_bytes()
    assert method.seen == [(kind, (LAYERS, HEADS, 124, DIM)) for kind in ("key", "value")], "once, 4 sinks left out"
    for layer in cache.layers:
        for side in (layer.keys, layer.values):
            zero = (side[0, 0] == 0).all(-1)
            assert zero.tolist() == [4 <= token < 128 for token in range(200)]


def test_places():
    assert [Places().coded_until(seen) for seen in (0, 64, 127, 128, 191, 192, 4096)] == [0, 0, 0, 64, 64, 128, 4032]
    assert [Places().exact(seen) for seen in (0, 100, 128, 4096)] == [0, 100, 68, 68]
    keys, values = AS_PAPER["key"], AS_PAPER["value"]
    assert [keys.exact(seen) for seen in (127, 128, 300)] == [127, 0, 44]
    assert [values.exact(seen) for seen in (100, 128, 129, 300)] == [100, 128, 128, 128]


@pytest.mark.parametrize("name", list(BASELINES))
def test_counted_bits_are_those_of_packed_bytes(name, calibration):
    method = BASELINES[name](calibration)
    for kind, tokens in itertools.product(("key", "value"), (60, 64)):
        stored = method.encode(kind, vectors(tokens))
        packed = stored.packed()
        # Each tensor of codes begins a new byte; the formula packs without gaps.
        assert 0 <= len(packed) - stored.bits / 8 <= len(stored.codes)
        for codes in stored.codes:
            assert 0 <= codes.values.min() <= codes.values.max() < 2**codes.bits
        assert all(half.dtype == torch.float16 for half in stored.halves)
        assert method.decode(kind, stored).shape == (LAYERS, HEADS, tokens, DIM)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back(bits):
    values = torch.randint(0, 2**bits, (7, 5), generator=torch.Generator().manual_seed(bits))
    packed = Stored((Codes(values, bits),)).packed()
    assert len(packed) == math.ceil(35 * bits / 8)
    stream = np.unpackbits(np.frombuffer(packed, np.uint8))[: 35 * bits].reshape(35, bits)
    assert (stream @ (1 << np.arange(bits)[::-1])).tolist() == values.flatten().tolist()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bits_per_element_are_the_papers(bits, calibration):
    elements = vectors(128).numel()
    # Heads of 16 here, so a group of a token's values is 16 wide; keys have groups of 32 tokens.
    assert Kivi(bits).encode("key", vectors(128)).bits == elements * (bits + 32 / 32)
    assert Kivi(bits).encode("value", vectors(128)).bits == elements * (bits + 32 / 16)
    assert Kivi(bits).encode("value", torch.randn(1, 1, 1, 64)).bits == 64 * (bits + 1)
    assert TurboQuant(bits, DIM).encode("key", vectors(128)).bits == elements * (bits + 16 / DIM)
    palu = fit_palu(calibration, 0.5, bits)
    blocks = regular_blocks(calibration.geometry, 1, None)
    ranks = sum(r for r, b in zip(palu.config["ranks"], blocks, strict=True) if b[0].kind == "key")
    assert palu.encode("key", vectors(128)).bits == 128 * (ranks * bits + 32 * LAYERS)
    raw = fit_palu(calibration, 0.5, 16)
    assert raw.encode("key", vectors(128)).bits == 128 * ranks * 16


@pytest.mark.parametrize("name", ["kivi-2bit", "kivi-sinks-2bit", "turboquant-3bit", "palu-50-4bit"])
def test_a_caches_bytes_are_the_formulas(name, model, calibration):
    method = BASELINES[name](calibration)
    cache = cache_of(method, calibration)
    with torch.no_grad():
        for part in token_ids(300).split(64, dim=1):
            model(part, past_key_values=cache)
    expected = 0.0
    for kind in ("key", "value"):
        places = method.places[kind]
        exact, coded = places.exact(300), 300 - places.exact(300)
        expected += exact * LAYERS * HEADS * DIM * 2
        # However tokens came in, codes take what coding them all at once takes, but for groups that a pass cut short.
        expected += method.encode(kind, vectors(coded)).bits / 8
    assert cache.stored_bytes() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("kind", "dim", "sizes"), [("key", 2, [28, 32, 32, 32]), ("value", 3, [16])])
def test_kivi_codes_each_group_between_its_ends(kind, dim, sizes):
    x = vectors(124)
    y = Kivi(4).decode(kind, Kivi(4).encode(kind, x))
    for a, b in zip(x.split(sizes, dim), y.split(sizes, dim), strict=True):
        step = (a.amax(dim, keepdim=True) - a.amin(dim, keepdim=True)) / 15
        assert ((a - b).abs() <= step * 0.51 + 2e-3).all()


def test_uniform_quantisation_has_a_twelfth_of_a_squared_step():
    x = torch.rand(100, 4096, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        y = dequantise(*quantise(x, bits, dim=1))
        step = 1 / (2**bits - 1)
        assert float((x - y).square().mean()) == pytest.approx(step**2 / 12, rel=0.05)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_of_a_normal_is_maxs_table(bits, error):
    """Max, "Quantizing for minimum distortion" (1960), table I."""
    x = torch.linspace(-7, 7, 100_001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    levels = lloyd_max(x, density, 2**bits)
    nearest = (x[:, None] - levels).abs().argmin(1)
    assert float(((x - levels[nearest]).square() * density).sum() / density.sum()) == pytest.approx(error, rel=2e-3)


def test_a_codebook_of_the_sphere_nears_the_normal_one():
    assert (sphere_codebook(1, 4096).abs() * 64).tolist() == pytest.approx([0.7979, 0.7979], rel=1e-3)
    assert (sphere_codebook(2, 4096)[2:] * 64).tolist() == pytest.approx([0.4528, 1.510], rel=1e-3)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_turboquants_error_does_not_depend_on_the_vectors(bits, error):
    method = TurboQuant(bits, 128)
    spiky = torch.zeros(1, 1, 500, 128)
    spiky[0, 0, torch.arange(500), torch.randint(0, 128, (500,), generator=torch.Generator().manual_seed(0))] = 30.0
    smooth = torch.randn(1, 1, 500, 128, generator=torch.Generator().manual_seed(1))
    for x in (smooth, spiky + 0.1 * smooth):
        y = method.decode("key", method.encode("key", x))
        relative = float(((x - y).square().sum(-1) / x.square().sum(-1)).mean())
        assert relative == pytest.approx(error, rel=0.1)
    assert torch.allclose(random_rotation(128, 3) @ random_rotation(128, 3).T, torch.eye(128), atol=1e-5)


def test_palu_with_all_ranks_gives_back_everything(calibration):
    palu = fit_palu(calibration, 1.0, 16)
    x = vectors()
    for kind in ("key", "value"):
        assert torch.allclose(palu.decode(kind, palu.encode(kind, x)), x, atol=1e-2)


def test_fisher_information_is_that_of_the_gradients(model, calibration):
    blocks = tuple(regular_blocks(calibration.geometry, 1, 1))
    found = dict(zip(blocks, fisher_of_blocks(calibration, blocks), strict=True))
    own = tiny_model("llama")
    squares = 0
    for window in calibration.windows[:8, :512]:
        own.zero_grad()
        own(input_ids=window[None], labels=window[None]).loss.backward()
        squares = squares + own.model.layers[2].self_attn.v_proj.weight.grad.square() / 8
    block = next(b for b in blocks if b[0] == (2, 1, "value"))
    assert found[block] == pytest.approx(float(squares[DIM:].sqrt().mean()), rel=1e-4)
    gpt2 = Calibration(tiny_model("gpt2"), token_ids(64))
    with pytest.raises(InputError, match="k_proj"):
        fisher_of_blocks(gpt2, tuple(regular_blocks(gpt2.geometry, 1, None)))


def test_ranks_follow_information_within_their_limits():
    assert share_ranks([1.0, 3.0], [100, 100], 0.4) == [20, 60]
    assert share_ranks([1.0, 9.0], [100, 100], 0.75) == [50, 100]
    assert share_ranks([1.0, 1.0, 1.0], [10, 10, 10], 0.5) == [5, 5, 5]
    assert share_ranks([5.0, 1.0], [8, 8], 1.0) == [8, 8]
    assert share_ranks([1e-9, 1.0], [20, 20], 0.2) == [1, 7], "each keeps at least one"


def test_groups_spend_the_budget_where_the_variance_is():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, 256, generator=generator) * torch.logspace(1, -3, 256)
    errors = []
    for budget in (256, 512, 1024):
        groups = allocate_groups(sample, budget)
        assert sum(g.stored_bits for g in groups) <= budget
        assert all(g.start % g.size == 0 for g in groups)
        assert [g.start for g in groups] == sorted(g.start for g in groups)
        bits = torch.zeros(256)
        for g in groups:
            bits[g.start : g.start + g.size] = g.bits
        assert (bits.diff() <= 0).all(), "variance falls, and bits with it"
        errors.append(sum(sample[:, i].square().mean() for i in range(256) if not bits[i]))
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(InputError, match="too few"):
        allocate_groups(sample, 40)


def test_the_partition_is_the_best_of_all():
    sample = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(1, -2, 64)
    choices = _choices(sample)

    def every(start):
        if start == 64:
            yield 0.0
            return
        for choice in choices[start]:
            for rest in every(start + choice.group.size):
                yield choice.error + price * choice.group.stored_bits + rest

    for price in (1e-3, 1e-1, 3.0):
        found = _partition(choices, 64, price)
        kept = sum(price * g.stored_bits for g in found)
        by_group = {c.group: c.error for each in choices.values() for c in each}
        covered = {i for g in found for i in range(g.start, g.start + g.size)}
        dropped = sum(by_group[Group(i, 16, 0)] for i in range(0, 64, 16) if i not in covered)
        assert kept + dropped + sum(by_group[g] for g in found) == pytest.approx(min(every(0)), rel=1e-6)


def test_kvtc_counts_deflated_bytes_and_inverts_its_transform(calibration):
    kvtc = fit_kvtc(calibration, 2.5)
    x = vectors()
    stored = kvtc.encode("key", x)
    assert kvtc.stored_bits(stored) == 8 * len(zlib.compress(stored.packed(), 9)) <= stored.bits + 8 * 100
    fine = Kvtc(calibration.geometry, kvtc._transforms, 2.5)
    t = fine._transforms["value"]
    assert torch.allclose(t.basis.T @ t.basis, torch.eye(t.basis.shape[1]), atol=1e-4)
    inside = (torch.randn(64, t.basis.shape[1], generator=torch.Generator().manual_seed(2)) @ t.basis.T + t.mean).unflatten(
        1, (LAYERS, HEADS, DIM)
    ).permute(1, 2, 0, 3)  # fmt: skip
    y = fine.decode("value", fine.encode("value", inside))
    assert float((inside - y).square().mean() / (inside - t.mean.view(LAYERS, HEADS, 1, DIM)).square().mean()) < 0.15


@pytest.mark.parametrize("sizes", [[f"kivi-{b}bit" for b in (4, 3, 2)], [f"turboquant-{b}bit" for b in (4, 3, 2)],
                                   ["palu-30", "palu-50"], ["palu-30-4bit", "palu-30-3bit"], ["kvtc-8x", "kvtc-16x"]])  # fmt: skip
def test_smaller_codes_store_less_and_diverge_more(sizes, model, calibration):
    methods = {n: BASELINES[n](calibration) for n in sizes}
    caches = {n: (lambda m=method: cache_of(m, calibration)) for n, method in methods.items()}
    results = measure_fidelity(model, token_ids(400, batch=2), caches)
    divergences = [results[n].kl_divergence.value for n in sizes]
    assert divergences == sorted(divergences)
    stored = [results[n].stored_bytes for n in sizes]
    assert stored == sorted(stored, reverse=True)
    assert max(stored) < results[sizes[0]].full_bytes


def test_a_batch_is_refused(model, calibration):
    with pytest.raises(InputError, match="one sequence"), torch.no_grad():
        model(token_ids(8, batch=2), past_key_values=cache_of(Exact(), calibration))
