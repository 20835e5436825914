"""What one chunk of a prefill needs besides the cache and the weights, derived from the shapes of what exists at a time.

A pass holds some tensors from its start to its end (hidden states, masks, the chunk's keys and values until all layers
store together) and others only in one of its phases. What it needs is the first and the largest of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from kvcar.cache.attach import PREFILL_CHUNK_TOKENS
from kvcar.cache.encode import tokens_encoded_at_once
from kvcar.geometry import BFLOAT16_BYTES, KINDS, Slot
from kvcar.kernels.attend.tiled import tile_tokens
from kvcar.layout import page_layout
from kvcar.plan import Plan

_FLOAT32_BYTES = 4
# Scores are masked and become weights in place.
_SCORES_ALIVE = 1
# Keys decoded, rotated, and one product on the way there; values decoded.
_DECODED_ALIVE = 4
# Queries as projected, rotated, and scaled in float32; the weighted sum, and the output made of it.
_QUERIES_ALIVE = 5
# A gated MLP's two projections and their product.
_MLP_ALIVE = 3


@dataclass(frozen=True)
class Transient:
    """Bytes by what takes them.

    Attributes:
        held: through the whole pass.
        phases: of which one exists at a time.
    """

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def nbytes(self) -> int:
        """The maximum that exists at one time."""
        return sum(self.held.values()) + max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"bytes": self.nbytes, "held": self.held, "phases": self.phases}


def prefill_transient(
    plan: Plan,
    config: PreTrainedConfig,
    past_tokens: int,
    element_bytes: int,
    chunk: int = PREFILL_CHUNK_TOKENS,
    batch: int = 1,
) -> Transient:
    """Of the pass over a prompt's next ``chunk`` tokens with the compressed cache of ``plan``, on a CPU.

    Args:
        plan: what the cache is made from.
        config: of the model; its MLP is taken to be gated, which needs the most.
        past_tokens: tokens in the cache when the pass starts.
        element_bytes: of an element of what the model computes in.
        chunk: tokens of the pass.
        batch: sequences.
    """
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    tokens = batch * chunk
    held = {
        "hidden states": tokens * hidden * element_bytes,
        "mask": tokens * (past_tokens + chunk),
        "keys and values of the chunk": _chunk_elements(plan, tokens) * element_bytes,
    }
    phases = {
        "attention": tokens * hidden * element_bytes + _attention(plan, text, past_tokens, element_bytes, chunk, batch),
        "mlp": tokens * (hidden + _MLP_ALIVE * _mlp_width(text)) * element_bytes,
        "encoding": _encoding(plan, min(chunk, tokens_encoded_at_once(plan, batch)), batch),
        "logits of one token": batch * int(text.vocab_size) * element_bytes,
    }
    return Transient(held, phases)


def _chunk_elements(plan: Plan, tokens: int) -> int:
    """Keys and values of coded layers, which stay apart until the pass ends; other layers' are in the cache at once."""
    return tokens * len(plan.coded_layers) * plan.geometry.layer_elements_per_token


def _mlp_width(config: PreTrainedConfig) -> int:
    given = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(given or 4 * config.hidden_size)


def _attention(
    plan: Plan, config: PreTrainedConfig, past_tokens: int, element_bytes: int, chunk: int, batch: int
) -> int:
    """One layer's, over what is exact and then over tiles of pages; scores of only one of them exist at a time."""
    geometry = plan.geometry
    rows = batch * geometry.query_heads * chunk
    # What the window holds, plus the page that is not full yet; and the sinks.
    exact = min(past_tokens, plan.window + plan.page_tokens + plan.sinks) + chunk
    tile = min(past_tokens, tile_tokens(geometry.query_heads * chunk, fuses := _fuses(plan, config)))
    queries = _QUERIES_ALIVE * rows * geometry.head_dim * _FLOAT32_BYTES
    joined = batch * exact * geometry.layer_elements_per_token * element_bytes
    # The mask is repeated for the query heads that share a KV head; fused attention adds it to scores that never exist.
    mask = rows // geometry.kv_heads * exact
    decoded = batch * _decoded_tile(plan, tile)
    if fuses:
        return queries + joined + max(mask * (1 + _FLOAT32_BYTES), decoded)
    exact_scores, paged_scores = (rows * n * _SCORES_ALIVE * _FLOAT32_BYTES for n in (exact, tile))
    return queries + joined + max(exact_scores + mask, paged_scores + decoded)


def _fuses(plan: Plan, config: PreTrainedConfig) -> bool:
    """Whether attention is fused, as it is where scores are not capped and keys rotate, so that no decoder is folded."""
    return plan.geometry.rotary and getattr(config, "attn_logit_softcapping", None) is None


def _decoded_tile(plan: Plan, tokens: int) -> int:
    """A tile's codes unpacked, as bytes and as float32, and the keys and values that they decode to."""
    geometry = plan.geometry
    decoded = _DECODED_ALIVE * tokens * geometry.kv_heads * geometry.head_dim * _FLOAT32_BYTES
    return tokens * _most_latents(plan) * (1 + _FLOAT32_BYTES) + decoded


def _most_latents(plan: Plan) -> int:
    """Stored values that attention of one layer reads, of the layer that reads most."""
    stored = {slot: unit for unit in page_layout(plan, BFLOAT16_BYTES).units for slot in unit.slots}
    most = 0
    for layer in plan.coded_layers:
        slots = (Slot(layer, head, kind) for kind in KINDS for head in range(plan.geometry.kv_heads))
        units = {stored[plan.stored_source[slot]].segment for slot in slots}
        most = max(most, sum(segment.latents for segment in units))
    return most


def _encoding(plan: Plan, tokens: int, batch: int) -> int:
    """A few pages at once: vectors of all layers, the stored values that they become, and their bytes."""
    layout = page_layout(plan, BFLOAT16_BYTES)
    vectors = _chunk_elements(plan, tokens) * _FLOAT32_BYTES
    stored = tokens * sum(unit.segment.latents for unit in layout.units) * (1 + _FLOAT32_BYTES)
    return batch * (vectors + stored + -(-tokens // plan.page_tokens) * layout.page_bytes)
