"""Bundles for tiny models: fitted ones, and ones made by hand with any structure a plan can have."""

from __future__ import annotations

import torch
from tiny import POSITIONS, token_ids
from transformers import PreTrainedModel

from kvcar.bundle import Bundle, CodedBlock, FitProvenance, ModelIdentity
from kvcar.fit.capture import capture
from kvcar.fit.fit import fit_bundle
from kvcar.fit.moments import Moments
from kvcar.fit.options import FitOptions
from kvcar.fit.solve import groups_of, linear_codec, principal_basis
from kvcar.text import TextSource
from kvcar.models.fingerprint import fingerprint
from kvcar.models.geometry import read_geometry
from kvcar.plan import Block, CacheConfig, Plan, Reuse
from kvcar.geometry import Slot

SOURCE = TextSource("random tokens", "random tokens", "0" * 64)


def fitted(model: PreTrainedModel, **options: object) -> Bundle:
    """A bundle fitted on random tokens."""
    given = {"page_tokens": 32, "window": 32} | options
    windows = token_ids(256, batch=8, seed=7)
    return fit_bundle(model, "tiny", windows, SOURCE, FitOptions(**given))  # pyright: ignore[reportArgumentType]


def by_hand(
    model: PreTrainedModel,
    blocks: list[tuple[Slot, ...]],
    bits: int | list[int] = 6,
    reuses: tuple[Reuse, ...] = (),
    **plan: object,
) -> Bundle:
    """A bundle with linear codecs for the given blocks, every latent at ``bits`` or at a cycle of bits."""
    geometry = read_geometry(model.config)
    moments = [Moments(len(block) * geometry.head_dim, 4) for block in blocks]
    for _ in capture(model, geometry, token_ids(256, batch=4, seed=9), blocks, 4, lambda i, x: moments[i].add(x)):
        pass
    planned, coded = [], []
    for block, stats in zip(blocks, moments, strict=True):
        basis = principal_basis(stats.mean, stats.covariance)
        width = len(basis.mean)
        cycle = [bits] if isinstance(bits, int) else bits
        own = torch.tensor([cycle[i % len(cycle)] for i in range(width)])
        coded.append(CodedBlock(*linear_codec(basis, own, stats.sample)))
        planned.append(Block(codec="linear", slots=block, groups=groups_of(own)))
    dtype = {name: plan.pop(name) for name in ("exact_dtype",) if name in plan}
    config = CacheConfig(**({"page_tokens": 32, "window": 32} | plan))  # pyright: ignore[reportArgumentType]
    whole = Plan(geometry=geometry, blocks=tuple(planned), reuses=reuses, cache=config, **dtype)  # pyright: ignore[reportArgumentType]
    return _bundle(model, whole, tuple(coded))


def exact(model: PreTrainedModel) -> Bundle:
    """A bundle that codes nothing at all: every layer keeps an ordinary cache."""
    return _bundle(model, Plan(geometry=read_geometry(model.config), cache=CacheConfig(page_tokens=32, window=32)), ())


def _bundle(model: PreTrainedModel, plan: Plan, coded: tuple[CodedBlock, ...]) -> Bundle:
    print_ = fingerprint(model)
    identity = ModelIdentity(name="tiny", architecture="Tiny", dtype=print_.dtype, fingerprint=print_.digest)
    fit = FitProvenance(
        kvcar_version="0", torch_version="0", transformers_version="0", date="2000-01-01", text="none",
        text_sha256="0" * 64, tokens=1, context=POSITIONS, seed=0, options={},
    )  # fmt: skip
    return Bundle(plan, coded, print_, identity, fit)
