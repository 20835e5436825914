"""Tuning the model itself to its compressed cache, as the paper does after choosing which heads to share.

Source: KV-CAR (arXiv 2512.06727), Algorithm 2: cross-entropy + lambda x L1 between actual and reused tensors. Only
attention weights change, so that the full-cache model before tuning stays the teacher of the "kl" objective.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import InputError
from ..models.fingerprint import fingerprint
from ..models.structure import find_decoder
from ..progress import OnProgress, silent
from ..text import TextSource
from .options import OnStep, TrainOptions, TrainResult, check_training, ignore, provenance_with
from .simulate import units_of
from .trainer import Run

Tuned = Literal["kv", "attention"]

# Names of key and value projections in transformers; fused ones bring the queries along.
_KV_NAMES = ("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value", "kv_proj")


def finetune_weights(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    source: TextSource,
    options: TrainOptions | None = None,
    tuned: Tuned = "kv",
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: OnProgress = silent,
    on_step: OnStep = ignore,
) -> TrainResult:
    """Tune weights of ``model`` in place; the bundle that comes back is tied to the tuned weights.

    Args:
        model: the model that the bundle was fitted for, in float32, with sdpa attention.
        bundle: what is compressed; its codecs do not change.
        windows: token ids int64 ``[N, context]``; the last ones are held out for validation.
        source: where they come from, for provenance.
        options: see ``TrainOptions``; ``joint_steps`` is the number of steps, there are no others.
        tuned: "kv" (key and value projections of compressed layers) or "attention" (all their attention weights).
        checkpoint, resume, on_progress, on_step: as in ``train_bundle``.

    Raises:
        InputError: the model is not in float32, or has no such weights.
        FitError: training diverged; the weights are the best seen before.
    """
    options = options or TrainOptions()
    check_training(model, bundle, windows, options)
    if model.dtype != torch.float32:
        raise InputError(f"fine-tuning needs the model in float32, got {model.dtype}; load it with dtype='float32'")
    coded = any(block.codec is not None for block in bundle.blocks)
    units = units_of(bundle, model.device).requires_grad_(False) if coded else {}
    weights = _Weights(_chosen(model, bundle, tuned))
    run = Run(model, bundle, windows, options, units, weights, on_progress, on_step)
    run.go([lambda: run.whole_stage("weights", list(weights.parameters()))], checkpoint, resume)
    print_ = fingerprint(model)
    identity = bundle.model.model_copy(update={"fingerprint": print_.digest, "dtype": print_.dtype})
    fit = provenance_with(bundle, source, windows, options, finetuned=tuned)
    return TrainResult(replace(bundle, fingerprint=print_, model=identity, fit=fit), run.state.history)


class _Weights(nn.Module):
    """The tuned weights under names that a state dict can hold."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name.replace(".", "/"), weight)


def _chosen(model: PreTrainedModel, bundle: Bundle, tuned: Tuned) -> dict[str, nn.Parameter]:
    attention = find_decoder(model).attention
    chosen = {}
    for layer in bundle.plan.coded_layers:
        for name, weight in attention[layer].named_parameters():
            if tuned == "attention" or any(part in _KV_NAMES for part in name.split(".")):
                chosen[f"{layer}.{name}"] = weight
    if not chosen:
        raise InputError(
            f"{type(model).__name__} names its key and value projections unusually; tune 'attention' instead"
        )
    return chosen
