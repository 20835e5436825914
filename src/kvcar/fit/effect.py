"""What an error in a key or a value costs: the second derivative of the divergence, one matrix per layer and kind.

To second order the KL divergence that errors ``e`` in a slot's vectors cause is ``e' M e / 2`` per token, with ``M`` the
Fisher information of all next-token distributions that read the vector from the pages: the mean of ``g g'`` over gradients
``g`` of the log-probability of tokens drawn from the model's own distributions. Only queries that would read the vector
decoded count: those a window away. Under this metric a block's directions, bits of all blocks, and keys against values are
all in one currency, nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..geometry import Kind, KVGeometry
from ..models.attention_hook import AttentionHook, frozen
from ..progress import OnProgress, counter, silent
from .attention import softmax_with_sinks
from .processes import own_share, total

DAMPING = 0.3

OnLayer = Callable[[int, Kind, Tensor], None]
"""(layer, kind, gradients float32 ``[tokens, H * D]``) -> None."""


class EffectProbe(AttentionHook):
    """Runs windows forwards and backwards and hands out the gradients that reach keys and values.

    Args:
        model: a causal language model; its parameters get no gradients.
        geometry: its cache.
        sinks: first tokens, which are exact and left out.
        step_tokens: tokens fed at once, which read each other exactly.
        window: recent tokens read exactly, a multiple of ``step_tokens``.
        seed: of the tokens drawn.
    """

    def __init__(
        self, model: PreTrainedModel, geometry: KVGeometry, sinks: int, step_tokens: int, window: int, seed: int = 0
    ) -> None:
        super().__init__(model, geometry)
        self.sinks, self._step_tokens, self._window = sinks, step_tokens, window
        self._seed = seed

    def run(self, windows: Tensor, on_gradients: OnLayer) -> Iterator[int]:
        """Go over ``windows`` int64 ``[N, T]`` one by one, yielding the tokens that were taken in.

        Args:
            windows: token ids.
            on_gradients: given the gradients at each layer's keys (before RoPE) and values, per token.
        """
        self._gradients = on_gradients
        handle = self.model.get_input_embeddings().register_forward_hook(
            lambda *a: a[-1].detach().requires_grad_().clone()
        )
        try:
            with frozen(self.model), self:
                for window in windows:
                    # By window, so that it does not matter which process runs it.
                    self._draw = torch.Generator().manual_seed(self._seed + int(window.sum()))
                    with torch.inference_mode(False), torch.enable_grad():
                        logits = self.model(input_ids=window[None].to(self.parts.device), use_cache=False).logits[0]
                        likelihood = self._likelihood(logits)
                        if likelihood.requires_grad:  # not where the last product is of weights that have no gradient
                            likelihood.backward()
                    yield len(window) - self.sinks
        finally:
            handle.remove()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor | None:
        """See ``AttentionHook``; computes what the model would, and listens to what comes back."""
        if layer not in self.geometry.codable_layers:
            return None
        heads, tokens = key.shape[1], key.shape[2]
        q = query.float().unflatten(1, (heads, -1)) * scaling
        scores = q @ key.float()[:, :, None].transpose(-1, -2)
        far = self._far(tokens, key.device)

        # None where what comes after the layer has no gradient, as products of some quantised weights.
        def hear_keys(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            reached = (gradient.masked_fill(~far, 0).transpose(-1, -2) @ q.detach()).sum(2)
            scale = self.tables[layer].attention_scale ** 2 if layer in self.tables else 1.0
            # The adjoint of rotating by an angle is rotating back; a factor on it appears once more.
            self._gradients(layer, "key", self._flat(self.before_rope(layer, reached) * scale))

        if scores.requires_grad:
            scores.register_hook(hear_keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = softmax_with_sinks(scores.masked_fill(self.hidden(layer, tokens, key.device), -torch.inf), sinks)
        output = weights @ value.float()[:, :, None]

        def hear_values(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            reached = (weights.detach().masked_fill(~far, 0).transpose(-1, -2) @ gradient).sum(2)
            self._gradients(layer, "value", self._flat(reached))

        if output.requires_grad:
            output.register_hook(hear_values)
        return output.flatten(1, 2).to(query.dtype)

    def _far(self, tokens: int, device: torch.device) -> Tensor:
        """Which query (row) reads which token (column) from the pages, bool ``[T, T]``."""
        step = torch.arange(tokens, device=device) // self._step_tokens
        return step[:, None] - step[None, :] > self._window // self._step_tokens

    def _flat(self, side: Tensor) -> Tensor:
        """``[tokens, H * D]`` of ``[1, H, T, D]``, sinks left out."""
        return side[0, :, self.sinks :].float().transpose(0, 1).flatten(1)

    def _likelihood(self, logits: Tensor) -> Tensor:
        """Summed log-probability of one token drawn from each distribution ``[T, V]``."""
        with torch.no_grad():
            cumulative = torch.softmax(logits.float(), -1).cumsum(-1)
            drawn = (
                torch.rand(len(logits), 1, generator=self._draw, dtype=torch.float32).to(logits.device)
                * cumulative[:, -1:]
            )
            tokens = torch.searchsorted(cumulative, drawn).clamp_max(logits.shape[-1] - 1)
        return -torch.nn.functional.cross_entropy(logits.float(), tokens[:, 0], reduction="sum")


def effect_metrics(
    probe: EffectProbe, windows: Tensor, on_progress: OnProgress = silent
) -> dict[tuple[int, Kind], Tensor]:
    """(layer, kind) -> mean outer product of gradients, float64 ``[H * D, H * D]``, over windows int64 ``[N, T]``."""
    sums: dict[tuple[int, Kind], Tensor] = {}

    def add(layer: int, kind: Kind, gradients: Tensor) -> None:
        outer = (gradients.T @ gradients).double().cpu()
        sums[layer, kind] = sums[layer, kind].add_(outer) if (layer, kind) in sums else outer

    own = own_share(windows)
    count = counter(on_progress, "measure the effect of errors", own.shape[0] * (own.shape[1] - probe.sinks))
    count(0)
    for tokens in probe.run(own, add):
        count(tokens)
    tokens = windows.shape[0] * (windows.shape[1] - probe.sinks)
    # In the same order everywhere: the backward pass reaches values before keys, last layer first.
    return {key: total(sums[key]) / tokens for key in sorted(sums)}


def damped(metric: Tensor, covariance: Tensor) -> Tensor:
    """The metric plus a share of plain normalised error that costs as much in all.

    A few thousand gradients do not show every direction, and the quadratic model does not hold far out: without the share,
    divergence on held-back text was up to a quarter larger.
    """
    variance = covariance.diagonal().clamp_min(1e-12)
    share = float((metric * covariance).sum()) / len(variance)
    return metric + torch.diag(DAMPING * max(share, 1e-12) / variance)
