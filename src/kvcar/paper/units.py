"""One block in training: its trainable codec and its quantiser, through which gradients pass straight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..codecs import Quantizer, TrainableCodec, read_quantizer
from ..codecs.autoencoder import AutoencoderModule
from ..errors import InputError
from ..fit.capture import capture
from ..fit.moments import Moments
from ..plan import RAW_BITS, Plan


class Unit(nn.Module):
    """Encodes, rounds as the cache does, and decodes the vectors of one block.

    Args:
        codec: what is trained.
        quantizer: what rounds its latents; its steps stay as they are.
    """

    def __init__(self, codec: TrainableCodec, quantizer: Quantizer) -> None:
        super().__init__()
        self.codec, self.quantizer = codec, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``[..., W]`` of ``x`` ``[..., W]``, both float32."""
        flat = x.flatten(0, -2)
        z = self.codec.encode(flat)
        return self.codec.decode(straight_through(self.quantizer, z)).view_as(x)


def straight_through(quantizer: Quantizer, z: Tensor) -> Tensor:
    """Latents as the cache gives them back; the rounding's gradient counts as 1 (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (quantizer.latents(quantizer.codes(z.detach())) - z.detach())


def units_of(bundle: Bundle, device: torch.device) -> nn.ModuleDict:
    """A unit for every block that is not lossless, by the block's index as a string.

    Raises:
        InputError: a codec has nothing to train.
    """
    units: dict[str, nn.Module] = {}
    for index, (block, coded) in enumerate(zip(bundle.plan.blocks, bundle.blocks, strict=True)):
        if coded.codec is not None and coded.quantizer is not None:
            steps = {name: t.to(device) for name, t in coded.quantizer.tensors().items()}
            units[str(index)] = Unit(coded.codec.trainable(), read_quantizer(steps, block))
    if not units:
        raise InputError("this bundle has no block that can be trained; fit a linear or autoencoder bundle first")
    return nn.ModuleDict(units).to(device)


def random_units(model: PreTrainedModel, plan: Plan, windows: Tensor, seed: int, device: torch.device) -> nn.ModuleDict:
    """The paper's autoencoders as they are before any training, BatchNorm and all; inputs normalised by a pass over text.

    Raises:
        InputError: the plan has other codecs, or static steps, which need latents that are already known.
    """
    for block in plan.blocks:
        if block.codec != "autoencoder" or (block.groups[0].bits != RAW_BITS and block.scales == "static"):
            raise InputError(
                "a random start needs autoencoder blocks of 16-bit latents or dynamic scales; "
                f"got {block.codec} with {block.groups[0].bits if block.groups else 16} bits"
            )
    blocks = [block.slots for block in plan.blocks]
    moments = [Moments(len(slots) * plan.geometry.head_dim, windows.numel()) for slots in blocks]
    for _ in capture(model, plan.geometry, windows, blocks, plan.sinks, lambda index, x: moments[index].add(x)):
        pass
    torch.manual_seed(seed)
    units: dict[str, nn.Module] = {}
    for index, (block, stats) in enumerate(zip(plan.blocks, moments, strict=True)):
        std = stats.covariance.diagonal().clamp_min(1e-12).sqrt()
        module = AutoencoderModule(stats.mean.float(), std.float(), 2 * block.latents, block.latents)
        units[str(index)] = Unit(module, read_quantizer(_unit_steps(block.latents, device), block))
    return nn.ModuleDict(units).to(device)


def _unit_steps(latents: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a quantiser that leaves 16-bit latents as they are."""
    return {"scale": torch.ones(latents, device=device), "zero": torch.zeros(latents, device=device)}
