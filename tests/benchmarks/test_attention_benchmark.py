"""The benchmark of attention alone: synthetic pasts are what caches would hold, and a small run up to the page."""

import json

import attention
import attention_tables
import pages
import pytest
import torch
from speed.synthetic import RandomPast, Shape, random_bundle, random_plan

from kvcar.errors import InputError
from kvcar.kernels.attend import attend, naive
from kvcar.sizes import allocated_pages

SHAPE = Shape(8, 4, 16)


def past_of(tokens, batch=2, block_heads=2, latents=12, bits=4):
    plan = random_plan(SHAPE, tokens, block_heads, latents, bits)
    return RandomPast(random_bundle(plan), tokens, batch, torch.float32, torch.device("cpu"))


def test_a_random_past_can_be_attended_to():
    made = past_of(1000)
    query, (exact, paged) = made.query(), made.past()
    assert query.shape == (2, 8, 1, 16)
    assert exact.keys.shape == (2, 4, 68, 16)
    assert sum(tile.shape[1] for tile in paged.tiles) == allocated_pages(-(-paged.tokens // 64))
    out = attend(query, exact, paged, 0.25)
    assert torch.isfinite(out).all()
    assert torch.allclose(out, naive.attend(query, exact, paged, 0.25), atol=1e-4)


def test_bytes_and_operations_follow_from_the_shape():
    made = past_of(64 + 640, batch=3)
    assert made.coded_tokens == 640
    # Two blocks of keys and two of values, 12 latents of 4 bits each.
    assert made.bytes_read() == 3 * (640 * 4 * 12 // 2 + 68 * 2 * 4 * 16 * 4)
    decoding, scores, summing = 640 * 2 * 12 * 32, 640 * 8 * 16, 640 * 8 * 12
    assert made.operations() == 2 * 3 * (decoding + scores + summing + 2 * 68 * 8 * 16)


def test_shapes_and_blocks_that_make_no_sense_are_refused():
    for text in ("8,3,16", "8,4", "a,b,c", "0,0,16"):
        with pytest.raises(InputError):
            Shape.parse(text)
    for heads, latents in ((3, 4), (2, 33), (2, 0)):
        with pytest.raises(InputError):
            random_plan(SHAPE, 1000, heads, latents, 4)
    with pytest.raises(InputError, match="nothing to code"):
        past_of(68)


def test_bfloat16_is_measured_by_the_faster_product():
    assert attention.matmul_ceiling({"float32": 8.0, "bfloat16": 2.0}, "bfloat16") == 8.0
    assert attention.matmul_ceiling({"float32": 8.0, "bfloat16": 20.0}, "float32") == 8.0


def test_a_small_run_up_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "copy_bytes_per_second", lambda device: 1e9)
    monkeypatch.setattr(attention, "matmul_flop_per_second", lambda device, dtype: 1e10)
    attention.main(
        name="tiny", shape="8,4,16", contexts="200,300", batch=2, block_heads=4, latents=16, bits=3, rounds=2, calls=2,
        cold_mib=1, output=tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "attention-tiny.json").read_text())
    assert [at["context"] for at in record["attention"]] == [200, 300]
    for at in record["attention"]:
        assert set(at["contenders"]) == {"kvcar cpu", "SDPA bfloat16", "SDPA float32"}
        assert at["contenders"]["SDPA float32"]["bytes_read"] == 2 * 2 * 4 * at["context"] * 16 * 4
        assert at["contenders"]["SDPA float32"]["ratio_to"]["SDPA float32"]["median"] == 1.0
        assert all(each["step"]["n"] == 4 for each in at["contenders"].values())
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert "### tiny" in attention_tables.attention_sections()
    with pytest.raises(InputError, match="backend is one of"):
        attention.main(name="tiny", backend="none", output=tmp_path)
