"""Benchmarks of speed: figures from timings, turns, and a whole small run from contenders to the page."""

import json

import decode
import decode_tables
import pages
import pytest
import torch
from bundles import fitted
from speed.figures import Line, break_even, fit_line, ratios, spread
from speed.race import Pace, check_contexts
from speed.rounds import in_rounds, round_orders
from speed.runners import FULL, STATIC, full_runner, read_bundles, static_copy, twin
from tiny import tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcar.errors import InputError
from kvcar.models.geometry import read_geometry
from kvcar.sizes import full_size


def test_a_spread_is_robust_and_counts():
    found = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.lower_quartile, found.upper_quartile, found.n) == (3.0, 2.0, 4.0, 5)
    assert found.mean == 22.0
    assert spread([7.0]).as_dict("_ms")["median_ms"] == spread([7.0]).as_dict()["upper_quartile"] == 7.0


def test_ratios_are_taken_within_rounds():
    """A round that is ten times slower for all changes no ratio."""
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).upper_quartile == 2.0


def test_a_line_and_its_deviation():
    line = fit_line([1, 2, 3], [12.0, 14.0, 16.0])
    assert (line.slope, line.intercept, line.worst_deviation) == pytest.approx((2.0, 10.0, 0.0))
    bent = fit_line([0, 1, 2], [10.0, 13.0, 10.0])
    assert (bent.slope, bent.intercept) == pytest.approx((0.0, 11.0))
    assert bent.worst_deviation == pytest.approx(2 / 11)
    assert fit_line([5], [1.0]) is None


def test_lines_cross_only_where_they_were_measured():
    flat, steep = Line(1.0, 50.0, 0.0), Line(2.0, 10.0, 0.0)
    assert break_even(flat, steep, 0, 100).tokens == pytest.approx(40.0)
    assert break_even(flat, steep, 0, 100).sooner == "above"
    assert break_even(steep, flat, 0, 100).sooner == "below"
    assert (break_even(flat, steep, 0, 39).tokens, break_even(flat, steep, 0, 39).sooner) == (None, "nowhere")
    assert (break_even(flat, steep, 41, 99).tokens, break_even(flat, steep, 41, 99).sooner) == (None, "everywhere")
    parallel = Line(1.0, 60.0, 0.0)
    assert break_even(flat, parallel, 0, 100).sooner == "everywhere"


def test_everyone_takes_every_place_equally_often():
    orders = list(round_orders(["a", "b", "c"], 9, seed=1))
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert orders == list(round_orders(["a", "b", "c"], 9, seed=1))
    assert orders != list(round_orders(["a", "b", "c"], 9, seed=2))


def test_turns_are_interleaved():
    called = []
    turns = {name: (lambda name=name: called.append(name) or len(called)) for name in "abc"}
    given = in_rounds(turns, 4)
    assert all(sorted(called[first : first + 3]) == ["a", "b", "c"] for first in range(0, 12, 3))
    assert sorted(number for each in given.values() for number in each) == list(range(1, 13))


def test_contexts_must_leave_room_for_what_is_decoded():
    pace = Pace(rounds=4, steps=8, chunk=64)
    check_contexts([64, 96, 480], pace, 512)
    for contexts in ([64, 95], [64, 481], [], [0, 64]):
        with pytest.raises(InputError):
            check_contexts(contexts, pace, 512)


def test_a_twin_shares_weights_and_a_static_copy_goes_on_as_the_full_cache():
    model, ids = tiny_model("llama"), token_ids(40, batch=2)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    full = full_runner(other)
    full.feed(ids[:, :32])
    static = static_copy(full.cache, other.config, 8)
    with torch.no_grad():
        a, b = (other(input_ids=ids[:, 32:33], past_key_values=c).logits for c in (full.cache, static))
    assert torch.allclose(a, b, atol=1e-5)


def test_warming_up_leaves_no_trace():
    runner = full_runner(tiny_model("llama"))
    seen = []
    runner.model.register_forward_hook(lambda *_: seen.append(runner.cache.get_seq_length()))
    runner.warm_up(token_ids(80), 32)
    assert seen == [32, 64, 65, 66, 67]
    assert (runner.fed, runner.cache.get_seq_length(), runner.chunk_seconds) == (0, 0, [])


def test_bundles_are_named_unlike_the_caches_beside_them(tmp_path):
    fitted(tiny_model("llama"), bits=4).save_pretrained(tmp_path / "b")
    assert list(read_bundles([f"x={tmp_path / 'b'}"])) == ["x"]
    with pytest.raises(InputError, match="two contenders"):
        read_bundles([f"{STATIC}={tmp_path / 'b'}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    words = ["<pad>", *(f"w{i}" for i in range(127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>").save_pretrained(
        folder / "model"
    )
    (folder / "words.txt").write_text(" ".join(f"w{i}" for i in token_ids(2000)[0].tolist()))
    fitted(model, bits=4).save_pretrained(folder / "bundle")
    return folder


def test_a_small_run_from_contenders_to_the_page(folder, monkeypatch):
    decode.main(
        folder / "words.txt", name="tiny", bundle=[f"ours={folder / 'bundle'}"], model=str(folder / "model"),
        contexts="40,100,200", rounds=2, steps=3, batch=2, prefill_chunk=32, transformers="none", output=folder,
    )  # fmt: skip
    record = json.loads((folder / "decode-tiny.json").read_text())
    assert [at["context"] for at in record["decode"]] == [40, 100, 200]
    for at in record["decode"]:
        assert set(at["contenders"]) == {FULL, STATIC, "ours"}
        assert all(row["step"]["n"] == 6 for row in at["contenders"].values())
        assert at["contenders"][FULL]["ratio_to_full"]["median"] == 1.0
        full = full_size(read_geometry(tiny_model("llama").config))
        assert at["contenders"][FULL]["held_bytes"] == full(at["context"], 2)
    assert record["prefill"]["chunks"] == [[0, 32], [32, 8], [46, 32], [78, 22], [106, 32], [138, 32], [170, 30]]
    assert set(record["break_even"]["median"]["ours"]) == {FULL, STATIC}
    assert record["largest_batch"]["sequences"]["ours"] > record["largest_batch"]["sequences"][FULL]
    monkeypatch.setattr(pages, "RESULTS", folder)
    assert "### Growth with the context" in decode_tables.decode_pages()["decode.md"]
