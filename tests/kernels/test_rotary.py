"""Rotation from the model's frequencies against the model's own."""

import pytest
import torch
from tiny import tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcar.kernels.rotary import RotaryTable
from kvcar.models.geometry import read_geometry
from kvcar.models.rotation import learn_rotations


def llama_table(**overrides):
    model = tiny_model("llama", **overrides)
    ids = torch.arange(40)[None] + 5
    pair = model.model.rotary_emb(torch.zeros(1), ids)
    return learn_rotations(model, read_geometry(model.config))[0], pair, ids


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotates_as_the_model_does_and_back(rope):
    table, (cos, sin), positions = llama_table(rope_parameters=rope)
    keys = torch.randn(2, 3, 40, 16)
    _, expected = apply_rotary_pos_emb(keys, keys, cos, sin)
    rotated = table.rotate(keys, positions)
    torch.testing.assert_close(rotated, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(table.unrotate(expected, positions), keys, atol=2e-5, rtol=0)


def test_interleaved_pairs_and_partial_rotation():
    table = RotaryTable(torch.tensor([1.0, 0.1], dtype=torch.float64), 1.0, "interleaved")
    keys = torch.randn(1, 1, 5, 6)
    positions = torch.arange(5)[None]
    rotated = table.rotate(keys, positions)
    pairs = torch.view_as_complex(keys[..., :4].reshape(1, 1, 5, 2, 2).contiguous())
    turned = pairs * torch.exp(1j * positions[0, :, None] * torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(rotated[..., :4], torch.view_as_real(turned).flatten(-2))
    assert torch.equal(rotated[..., 4:], keys[..., 4:])
    torch.testing.assert_close(table.unrotate(rotated, positions), keys)


def test_far_positions_are_as_exact_as_near_ones():
    frequency = 1.0 / 10000 ** (torch.arange(8, dtype=torch.float64) / 8)
    table = RotaryTable(frequency, 1.0, "half")
    positions = torch.tensor([0, 63, 64, 4095, 100_003])
    cos, sin = table.cos_sin(positions)
    angles = positions[:, None] * frequency
    torch.testing.assert_close(cos.double(), angles.cos(), atol=3e-7, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=3e-7, rtol=0)
