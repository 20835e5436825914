"""Training the paper's autoencoder of one block on reconstruction, from the linear closed form as a start.

A LeakyReLU is undone by feeding it a value and its negative: ``lrelu(z) - lrelu(-z) = (1 + slope) z``. So an
autoencoder with twice as many hidden units as latents begins exactly at the PCA and can only be improved from there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codecs import AutoencoderCodec, Quantizer
from ..codecs.autoencoder import LEAKY_SLOPE, AutoencoderModule
from ..plan import BitGroup
from .basis import Basis, fit_quantizer

_BATCH = 512
_LEARNING_RATE = 1e-3
_HELD_OUT = 0.15


def train_autoencoder(
    basis: Basis, latents: int, bits: int, sample: Tensor, steps: int, seed: int
) -> tuple[AutoencoderCodec, Quantizer]:
    """Codec and quantiser of one block.

    Args:
        basis: the block's principal basis, where training starts.
        latents: width ``d`` of the latent.
        bits: bits of each latent, 1 to 8 or 16.
        sample: vectors ``[S, W]`` to train on; a part is held out to keep the best state seen.
        steps: optimiser steps; 0 keeps the closed form.
        seed: of the order of batches.
    """
    module = warm_start(basis, latents)
    cut = max(1, int(len(sample) * (1 - _HELD_OUT)))
    # Held-out tokens come from the end of the text, not from between the training tokens.
    train, held = sample[:cut], sample[cut:] if cut < len(sample) else sample
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    best, best_loss = module.fold(), _reconstruction_loss(module.fold(), held, module.std)
    for step in range(steps):
        batch = train[torch.randint(len(train), (min(_BATCH, len(train)),), generator=generator)]
        loss = nn.functional.mse_loss(module(batch)[1] / module.std, batch / module.std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            codec = module.fold()
            held_loss = _reconstruction_loss(codec, held, module.std)
            if held_loss < best_loss:
                best, best_loss = codec, held_loss
    return best, fit_quantizer((BitGroup(bits=bits, count=latents),), best.encode(sample))


@torch.no_grad()
def warm_start(basis: Basis, latents: int) -> AutoencoderModule:
    """An autoencoder that computes the PCA with ``latents`` directions, with ``2 * latents`` hidden units."""
    mean, std = basis.mean.float(), basis.std.float()
    module = AutoencoderModule(mean, std, hidden=2 * latents, latents=latents)
    # The module normalises its input by `std`, so the maps are those of normalised vectors; hidden units look along
    # directions of length 1 whatever the metric's unit, so that one learning rate fits all parameters.
    analysis = (basis.std[:, None] * basis.encoder[:, :latents]).float()
    lengths = analysis.norm(dim=0).clamp_min(1e-12)
    analysis = analysis / lengths
    synthesis = (basis.decoder[:latents] / basis.std).float() * lengths[:, None]
    spread = (basis.variances[:latents].float().sqrt() / lengths).clamp_min(1e-6)
    both = torch.cat([analysis.T, -analysis.T])
    undo = torch.cat([torch.eye(latents, dtype=torch.float32), -torch.eye(latents, dtype=torch.float32)]) / (
        1 + LEAKY_SLOPE
    )
    # Latents are scaled to unit variance, so that all of them quantise alike.
    _set_half(module.encoder, both, spread, (undo / spread).T)
    _set_half(
        module.decoder,
        torch.cat([torch.eye(latents, dtype=torch.float32), -torch.eye(latents, dtype=torch.float32)]),
        torch.ones(latents, dtype=torch.float32),
        synthesis.T * spread @ undo.T,
    )
    return module


def _set_half(half: nn.Sequential, first: Tensor, spread: Tensor, second: Tensor) -> None:
    """Set a half so that its BatchNorm, fed with hidden values of the given spread, passes them through."""
    linear_in, norm, _, linear_out = half
    assert isinstance(linear_in, nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(linear_out, nn.Linear)
    assert norm.running_var is not None
    both = torch.cat([spread, spread])
    linear_in.weight.copy_(first)
    linear_in.bias.zero_()
    norm.running_var.copy_(both.square())
    norm.weight.copy_((both.square() + norm.eps).sqrt())
    linear_out.weight.copy_(second)
    linear_out.bias.zero_()


@torch.no_grad()
def _reconstruction_loss(codec: AutoencoderCodec, x: Tensor, std: Tensor) -> float:
    error = (codec.decode(codec.encode(x)) - x) / std
    return float(error.square().mean())
