"""From "so many times smaller" to bits per token, with everything counted."""

from __future__ import annotations

from ..errors import FitError
from ..sizes import stored_bytes
from ..plan import BitGroup, Plan

REFERENCE_TOKENS = 4096
"""Context length at which ``times_smaller`` is promised."""


def times_smaller(plan: Plan, model_bytes: int, tokens: int = REFERENCE_TOKENS) -> float:
    """Bytes of the model's own cache in bfloat16 over bytes of the compressed one, everything counted."""
    return plan.geometry.full_bytes(tokens) / stored_bytes(plan, tokens, model_bytes)


def bits_for(plan: Plan, target: float, model_bytes: int) -> int:
    """Bits per token that blocks may spend in all so that the cache is ``target`` times smaller.

    Args:
        plan: sinks, window, pages and exact slots as they will be; its blocks say which slots are coded, and their
            own bits do not matter.
        target: wanted times smaller at ``REFERENCE_TOKENS`` tokens.
        model_bytes: bytes of an element that the model computes.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    geometry = plan.geometry
    budget = geometry.full_bytes(REFERENCE_TOKENS) / target
    fixed = stored_bytes(_with_bits(plan, 0), REFERENCE_TOKENS, model_bytes)
    one = stored_bytes(_with_bits(plan, 8), REFERENCE_TOKENS, model_bytes) - fixed
    latents = sum(len(b.slots) for b in plan.blocks) * geometry.head_dim
    # Padding of a page's segments to whole 16 bytes is the only part that is not proportional.
    spare = 16 * 8 * len(plan.blocks) / plan.page_tokens
    bits = int((budget - fixed) / one * 8 * latents - spare)
    if bits < 1:
        reach = geometry.full_bytes(REFERENCE_TOKENS) / fixed
        raise FitError(
            f"{target:g} times smaller is out of reach: sinks, window and layers kept exact alone allow no more than "
            f"{reach:.1f} times at {REFERENCE_TOKENS} tokens; ask for less, or for a smaller window"
        )
    return bits


def _with_bits(plan: Plan, bits: int) -> Plan:
    """The plan with every element of its blocks at ``bits`` bits (0: as good as none)."""
    blocks = []
    for block in plan.blocks:
        width = len(block.slots) * plan.geometry.head_dim
        count, each = (width, bits) if bits else (1, 1)
        blocks.append(block.model_copy(update={"groups": (BitGroup(bits=each, count=count),)}))
    return plan.model_copy(update={"blocks": tuple(blocks)})
