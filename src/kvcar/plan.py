"""A plan says for every slot how it is stored: exact, in a block, or not at all because it reuses another slot.

Plans are pure data: frozen, strictly validated, versioned JSON. Nothing here knows a tensor or a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from .errors import InputError, PlanError
from .files import parsed_json
from .geometry import KINDS, Kind, KVGeometry, PositiveInt, Slot, StrictModel

FORMAT_VERSION = 2
RAW_BITS = 16
PACKED_BITS = tuple(range(1, 9))
MOST_TRELLIS_BITS = 6
"""Latents of more bits have no trellis: with half steps their codes would not fit the kernels' products of bytes."""

_LONGEST_PROBLEM = 300  # a message quotes what a stranger wrote

DYNAMIC_SCALE_LATENTS = 2
MAX_PAGE_TOKENS = 1024
MAX_SINKS = 64
MAX_WINDOW = 2**30

ExactDtype = Literal["model", "bfloat16", "float16"]
Scales = Literal["static", "dynamic"]


def _read_slot(value: Any) -> Slot:
    """Accept a slot or its JSON form ``[layer, head, kind]``."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"a slot is [layer, head, kind], got {value!r}")
    layer, head, kind = value
    if type(layer) is not int or type(head) is not int or kind not in KINDS:
        raise ValueError(f"a slot is [layer, head, 'key' or 'value'], got {value!r}")
    return Slot(layer, head, kind)


SlotField = Annotated[Slot, PlainValidator(_read_slot), PlainSerializer(list)]


class BitGroup(StrictModel):
    """``count`` neighbouring latents of a block that are stored with ``bits`` bits each.

    1 to 8 bits are integers with a static scale per latent; 16 is an unquantised float16.
    """

    bits: Annotated[int, Field(ge=1, le=RAW_BITS)]
    count: PositiveInt

    @model_validator(mode="after")
    def _known_width(self) -> BitGroup:
        if self.bits not in PACKED_BITS and self.bits != RAW_BITS:
            raise ValueError(f"latents are stored with 1 to 8 bits or {RAW_BITS}, not {self.bits}")
        return self


class Block(StrictModel):
    """Slots coded together: side by side ``W`` wide, through one codec to ``R`` latents.

    ``groups`` lists the latents' widths in strictly falling order of bits. No group at all means that the codec
    stores its input losslessly, in the exact dtype (the identity codec).

    ``scales`` says where the steps of packed latents come from: "static" ones are in the bundle, one per latent;
    "dynamic" ones are computed for every token over all latents (the paper's int8) and stored with it, two float16.

    ``page_means`` says whether a page also stores, in 2 bits an element, what the errors of its tokens have in common.

    ``trellis`` says whether codes of 1 to 6 bits stand for values half a step apart, of which the codes before choose every
    other one (``kernels/trellis``).
    """

    codec: str
    slots: tuple[SlotField, ...] = Field(min_length=1, strict=False)
    groups: tuple[BitGroup, ...] = Field(default=(), strict=False)
    scales: Scales = "static"
    page_means: bool = False
    trellis: bool = False

    @property
    def latents(self) -> int:
        """``R``, the latents of this block; 0 when it is stored losslessly."""
        return sum(group.count for group in self.groups)

    @property
    def lossless(self) -> bool:
        """Whether slots are stored unchanged, in the plan's exact dtype."""
        return not self.groups

    @property
    def bits_per_token(self) -> int:
        """Bits that the packed latents of one token take; lossless blocks are counted by their dtype instead."""
        return sum(group.bits * group.count for group in self.groups) + RAW_BITS * self.scale_latents

    @property
    def scale_latents(self) -> int:
        """float16 numbers stored for each token besides its latents."""
        return DYNAMIC_SCALE_LATENTS if self.scales == "dynamic" else 0

    @property
    def kind(self) -> Kind | None:
        """The kind that all slots share, or None for a block that mixes keys with values."""
        kinds: set[Kind] = {slot.kind for slot in self.slots}
        return kinds.pop() if len(kinds) == 1 else None

    @model_validator(mode="after")
    def _ordered(self) -> Block:
        bits = [group.bits for group in self.groups]
        if bits != sorted(set(bits), reverse=True):
            raise ValueError(f"groups must fall strictly in bits, got {bits}")
        if self.scales == "dynamic" and (len(bits) != 1 or bits[0] not in PACKED_BITS):
            raise ValueError(f"dynamic scales need latents that all have the same 1 to 8 bits, got {bits}")
        if self.trellis and self.scales == "dynamic":
            raise ValueError("a trellis needs static scales")
        if len(set(self.slots)) != len(self.slots):
            raise ValueError("a block lists a slot twice")
        return self


@dataclass(frozen=True)
class Reuse:
    """``slot`` stores nothing and reads the reconstruction of ``source`` (the paper's Algorithm 2).

    Raises:
        InputError: one of them is no slot.
    """

    slot: Slot
    source: Slot

    def __post_init__(self) -> None:
        for name in ("slot", "source"):
            try:
                object.__setattr__(self, name, _read_slot(getattr(self, name)))
            except ValueError as error:
                raise InputError(f"{name} of a reuse: {error}") from None


def _read_reuse(value: Any) -> Reuse:
    """Accept a reuse or its JSON form."""
    if isinstance(value, Reuse):
        return value
    if not isinstance(value, dict) or set(value) != {"slot", "source"}:
        raise ValueError(f"a reuse is an object of slot and source, got {value!r}")
    return Reuse(**value)


def _reuse_data(reuse: Reuse) -> dict[str, Any]:
    return {"slot": list(reuse.slot), "source": list(reuse.source)}


ReuseField = Annotated[Reuse, PlainValidator(_read_reuse), PlainSerializer(_reuse_data)]


@dataclass(frozen=True)
class CacheConfig:
    """Which tokens of a sequence stay exact, and how many share a page.

    Attributes:
        window: most recent tokens kept exact, a multiple of ``page_tokens``; 0 codes every past token.
        sinks: first tokens of a sequence, kept exact for ever.
        page_tokens: tokens in a page of packed codes, a multiple of 32.
        max_page_cost: nats a token, on average over a page, beyond which a page is kept exactly instead of being read from its
            codes, as is one with a token that costs 2.5 times as much. For bundles whose codecs know what their errors cost
            (``linear8``); "auto" takes a few times what a page of the text costs that a bundle is fitted on; None for no limit.

    Raises:
        InputError: they do not fit each other.
    """

    window: int = 64
    sinks: int = 4
    page_tokens: int = 64
    max_page_cost: float | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "page_tokens"):
            value = getattr(self, name)
            if type(value) is not int:
                raise InputError(f"{name} must be a whole number, got {value!r}")
        if not 32 <= self.page_tokens <= MAX_PAGE_TOKENS or self.page_tokens % 32:
            raise InputError(
                f"page_tokens must be a multiple of 32, and at most {MAX_PAGE_TOKENS}; got {self.page_tokens}"
            )
        if not 0 <= self.window <= MAX_WINDOW or self.window % self.page_tokens:
            raise InputError(
                f"window must be 0 or a multiple of the page size, {self.page_tokens} tokens, and at most {MAX_WINDOW}; got {self.window}"
            )
        cost = self.max_page_cost
        if not (cost is None or (isinstance(cost, str) and cost == "auto") or _is_positive(cost)):
            raise InputError(
                f"max_page_cost must be a number of nats above 0, 'auto', or None for no limit; got {cost!r}"
            )
        if not 0 <= self.sinks <= min(self.page_tokens, MAX_SINKS):
            raise InputError(f"sinks must be 0 to {min(self.page_tokens, MAX_SINKS)}, got {self.sinks}")

    @property
    def page_cost_limit(self) -> float | None:
        """``max_page_cost`` where it is a number."""
        return None if isinstance(self.max_page_cost, str) else self.max_page_cost

    def with_window(self, window: int | None) -> CacheConfig:
        """The same with another window; None keeps this one's."""
        return self if window is None else replace(self, window=window)

    @property
    def step_tokens(self) -> int:
        """Tokens that read each other exactly where effects are measured and codecs trained: a page, or one without a window."""
        return self.page_tokens if self.window else 1


def _is_positive(number: object) -> bool:
    """Whether it is a finite number above 0."""
    if not isinstance(number, float | int) or isinstance(number, bool):
        return False
    try:
        return 0 < float(number) < math.inf
    except OverflowError:
        return False


def _read_cache_config(value: Any) -> CacheConfig:
    """Accept a config or its JSON form."""
    if isinstance(value, CacheConfig):
        return value
    known = {field.name for field in fields(CacheConfig)}
    # Bundles of before pages had a limit get the default one.
    if not isinstance(value, dict) or set(value) | {"max_page_cost"} != known:
        raise ValueError(f"a cache config is an object of {', '.join(sorted(known))}, got {value!r}")
    return CacheConfig(**value)


CacheConfigField = Annotated[CacheConfig, PlainValidator(_read_cache_config), PlainSerializer(asdict)]


class Plan(StrictModel):
    """How every slot of one model's KV cache is stored.

    Attributes:
        geometry: the cache this plan is for.
        blocks: slots coded together; slots in no block and no reuse stay exact.
        reuses: slots that read another slot's reconstruction.
        cache: sinks, window and pages.
        exact_dtype: dtype of sinks, window and lossless slots; "model" is the dtype the model computes in, and a model of
            16 bits always keeps its own.
    """

    format_version: Literal[2] = FORMAT_VERSION
    geometry: KVGeometry
    blocks: tuple[Block, ...] = Field(default=(), strict=False)
    reuses: tuple[ReuseField, ...] = Field(default=(), strict=False)
    cache: CacheConfigField = CacheConfig()
    exact_dtype: ExactDtype = "model"

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        _check_slots(self.geometry, self.blocks, self.reuses)
        return self

    @property
    def window(self) -> int:
        """Most recent tokens kept exact."""
        return self.cache.window

    @property
    def sinks(self) -> int:
        """First tokens kept exact."""
        return self.cache.sinks

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.cache.page_tokens

    def is_windowed(self, layer: int) -> bool:
        """Whether the pages of a layer are freed once its window has passed them."""
        return layer in self.geometry.windowed_layers

    @cached_property
    def block_of(self) -> dict[Slot, int]:
        """Index of the block that codes a slot, for the slots that are in one."""
        return {slot: index for index, block in enumerate(self.blocks) for slot in block.slots}

    @cached_property
    def stored_source(self) -> dict[Slot, Slot]:
        """For every codable slot the slot whose stored form it reads; itself unless it reuses another."""
        direct = {reuse.slot: reuse.source for reuse in self.reuses}
        resolved = {}
        for slot in self.geometry.slots():
            source = slot
            while source in direct:
                source = direct[source]
            resolved[slot] = source
        return resolved

    @cached_property
    def exact_slots(self) -> tuple[Slot, ...]:
        """Codable slots that are in no block and reuse nothing."""
        reusing = {reuse.slot for reuse in self.reuses}
        return tuple(s for s in self.geometry.slots() if s not in self.block_of and s not in reusing)

    @cached_property
    def coded_layers(self) -> tuple[int, ...]:
        """Layers with at least one slot that is coded or reused; the others keep an ordinary cache."""
        touched = {slot.layer for slot in self.block_of} | {reuse.slot.layer for reuse in self.reuses}
        sources = {self.stored_source[reuse.slot].layer for reuse in self.reuses}
        return tuple(sorted(touched | sources))

    @classmethod
    def checked(cls, **given: Any) -> Plan:
        """Make a plan of what a user gave; raises PlanError where parts do not fit each other."""
        try:
            return cls(**given)
        except ValidationError as error:
            raise PlanError(_first_problem(error)) from None

    def to_json(self) -> str:
        """Serialise; equal plans give equal text."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse and validate.

        Raises:
            PlanError: not JSON, an unknown format version, or anything that does not fit the schema.
        """
        try:
            data = parsed_json(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """Validate what ``json.loads`` gave; raises as ``from_json`` does."""
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, got {type(data).__name__}")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise PlanError(
                f"plan format version {str(version)[:20]} is not known to this kvcar, which reads version {FORMAT_VERSION}; "
                "upgrade kvcar or fit the bundle again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])[:80] or "plan"
    return f"the plan does not fit its schema at {place}: {first['msg'][:_LONGEST_PROBLEM]} (of {error.error_count()} problems)"


def _check_slots(geometry: KVGeometry, blocks: Iterable[Block], reuses: Iterable[Reuse]) -> None:
    owner: dict[Slot, str] = {}
    for index, block in enumerate(blocks):
        for slot in block.slots:
            _claim(owner, slot, f"block {index}", geometry)
        _check_together(block.slots, f"block {index}", geometry)
    direct: dict[Slot, Slot] = {}
    for reuse in reuses:
        _claim(owner, reuse.slot, f"a reuse of {reuse.source}", geometry)
        if reuse.source not in geometry:
            raise ValueError(f"slot {reuse.slot} reuses {reuse.source}, which this model does not have")
        if reuse.source.kind != reuse.slot.kind:
            raise ValueError(f"slot {reuse.slot} cannot reuse {reuse.source}: keys reuse keys, values reuse values")
        _check_together((reuse.slot, reuse.source), f"a reuse of {reuse.source}", geometry)
        direct[reuse.slot] = reuse.source
    for start in direct:
        seen, slot = {start}, direct[start]
        while slot in direct:
            if slot in seen:
                raise ValueError(f"the reuses that begin at slot {start} form a circle")
            seen.add(slot)
            slot = direct[slot]


def _check_together(slots: Iterable[Slot], by: str, geometry: KVGeometry) -> None:
    if len({slot.layer in geometry.windowed_layers for slot in slots}) > 1:
        raise ValueError(
            f"{by} has slots of layers that keep a window and of layers that keep everything, whose pages live differently long"
        )


def _claim(owner: dict[Slot, str], slot: Slot, by: str, geometry: KVGeometry) -> None:
    if slot not in geometry or slot.kind not in KINDS:
        raise ValueError(f"slot {slot} of {by} is not a slot that this model can compress")
    if slot in owner:
        raise ValueError(f"slot {slot} is claimed by {owner[slot]} and by {by}")
    owner[slot] = by
