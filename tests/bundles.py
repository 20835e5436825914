"""Bundles for tiny models: fitted ones, and ones made by hand with any structure a plan can have."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from tiny import POSITIONS, token_ids
from transformers import PreTrainedModel

from kvcar.bundle import Bundle, CodedBlock, FitProvenance, ModelIdentity
from kvcar.fit.basis import groups_of, linear_codec
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions, Structure
from kvcar.fit.statistics import bands_of, collect_statistics
from kvcar.geometry import Slot
from kvcar.models.fingerprint import fingerprint
from kvcar.models.geometry import read_geometry
from kvcar.plan import Block, CacheConfig, Plan, Reuse
from kvcar.text import TextSource

SOURCE = TextSource("random tokens", "random tokens", "0" * 64)


def fitted(model: PreTrainedModel, **options: object) -> Bundle:
    """A bundle of a given structure fitted on random tokens; options of ``FitOptions``, ``Structure`` and ``CacheConfig``."""
    return next(fit_bundles(model, token_ids(256, batch=8, seed=7), [fit_options(**options)], SOURCE, "tiny"))


def fit_options(**options: object) -> FitOptions:
    """Options of a given structure from names of any of the three; small pages and window unless they say otherwise."""
    given: dict[str, Any] = {"page_tokens": 32, "window": 32} | options
    cache = CacheConfig(**{f.name: given.pop(f.name) for f in fields(CacheConfig) if f.name in given})
    structure = Structure(**{f.name: given.pop(f.name) for f in fields(Structure) if f.name in given})
    return FitOptions(structure=structure, cache=cache, **given)


def by_hand(
    model: PreTrainedModel,
    blocks: list[tuple[Slot, ...]],
    bits: int | list[int] = 6,
    reuses: tuple[Reuse, ...] = (),
    **plan: object,
) -> Bundle:
    """A bundle with linear codecs for the given blocks, every latent at ``bits`` or at a cycle of bits."""
    geometry = read_geometry(model.config)
    statistics = collect_statistics(
        model, geometry, token_ids(256, batch=4, seed=9), bands_of(geometry, blocks), stride=4
    )
    planned, coded = [], []
    for block in blocks:
        basis = statistics.basis(block, "std")
        width = len(basis.mean)
        cycle = [bits] if isinstance(bits, int) else bits
        own = torch.tensor([cycle[i % len(cycle)] for i in range(width)])
        coded.append(CodedBlock(*linear_codec(basis, own, statistics.sample(block))))
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
