"""Stored prefixes in vLLM: what one engine wrote another one loads; bad and foreign records are computed again."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from bundles import by_hand
from record_pages import BUNDLES, limited, slots_of
from tiny import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/engines makes an environment for these tests")

from vllm import SamplingParams
from vllm_engine import POSITIONS, engine, expected_of, prompt, saved

from kvcar.bundle import Bundle
from kvcar.errors import ContextError
from kvcar.serve.record_store import SUFFIX, RecordStore

LONG = prompt(700, 3)
PROMPTS = [LONG, LONG[:600] + prompt(50, 4), LONG[:300] + prompt(300, 5), prompt(200, 6), LONG[:513], LONG[:512]]
STORED = [512, 512, 512, 0, 512, 256]
"""Tokens of each prompt that records of all of them hold."""


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=32, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def expected(model):
    return expected_of(model, PROMPTS, 16)


@pytest.fixture
def place(model, tmp_path):
    """Folders of the model and of records."""
    return saved(model, None, tmp_path)[0], tmp_path / "records"


def connected(place, bundle, **options):
    """An engine that stores prefixes."""
    model, records = place
    own = {
        "bundle": str(bundle.save_pretrained(records.parent / bundle.digest[:8], overwrite=True)),
        "folder": str(records),
    }
    transfer = {
        "kv_connector": "KVCarConnector", "kv_connector_module_path": "kvcar.serve.vllm_connector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": own,
    }  # fmt: skip
    return engine(model, kv_transfer_config=transfer, **options)


def salted(own, salt):
    """Prompt tokens that a request of this salt finds."""
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    (output,) = own.llm.generate([{"prompt_token_ids": LONG, "cache_salt": salt}], sampling, use_tqdm=False)
    return output.num_cached_tokens


def files(place):
    return sorted(place[1].rglob(f"*{SUFFIX}"))


def test_what_one_engine_wrote_another_one_loads(model, place, expected):
    bundle = BUNDLES["lossless"](model)
    with connected(place, bundle) as first:
        made = first.generate(PROMPTS, 16)
        assert made.tokens == expected
        assert len(files(place)) == 3  # pages 0 and 1 of LONG, page 1 of the one that diverges before it
        first.forget()
        again = first.generate(PROMPTS, 16)
        assert again.tokens == expected
    # In chunks, in blocks of another size.
    with connected(place, bundle, max_num_batched_tokens=160, block_size=64) as second:
        for own, tokens, stored in zip(PROMPTS, expected, STORED, strict=True):
            second.forget()
            found = second.generate([own], 16)
            assert (found.tokens, found.hits) == ([tokens], [stored])
        before = {path: path.stat().st_mtime_ns for path in files(place)}
        # Parts of a prefix are there: only the rest is loaded.
        second.forget()
        second.generate([LONG[:200]], 4)
        assert second.generate([LONG], 16).tokens == expected[:1]
    assert {path: path.stat().st_mtime_ns for path in files(place)} == before


@pytest.fixture(scope="module")
def written(model, tmp_path_factory, expected):
    """Records of the first prompt, written by an engine, and their bundle."""
    folder = tmp_path_factory.mktemp("written")
    bundle, place = BUNDLES["lossless"](model), (saved(model, None, folder)[0], folder / "records")
    with connected(place, bundle) as own:
        own.generate(PROMPTS[:1], 16)
    assert len(files(place)) == 2
    return place[1], bundle


@pytest.fixture
def filled(place, written):
    """The bundle of records that lie in their place."""
    shutil.copytree(written[0], place[1])
    return written[1]


def test_bad_records_are_computed_again(model, place, expected, filled, monkeypatch):
    good = {path: path.read_bytes() for path in files(place)}
    with connected(place, filled) as own:
        for damage in (lambda d: d[:1000], lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], lambda d: b""):
            for path, data in good.items():
                path.write_bytes(damage(data))
            own.forget()
            found = own.generate(PROMPTS[:1], 16)
            assert (found.tokens, found.hits) == (expected[:1], [0])
            # And written again.
            assert {path: path.read_bytes() for path in files(place)} == good
        # One that was sound when it was promised, and is not when it is read.
        read, tried = RecordStore.read, []

        def fail_second(store, key):
            tried.append(key)
            if key.position == 256:
                raise ContextError("as if damaged in between")
            return read(store, key)

        monkeypatch.setattr(RecordStore, "read", fail_second)
        own.forget()
        assert own.generate(PROMPTS[:1], 16).tokens == expected[:1]
        assert [key.position for key in tried][:2] == [0, 256]


def test_salted_requests_share_nothing(model, place, expected, filled):
    with connected(place, filled) as own:
        for salt, found in (("a tenant", 0), ("another", 0), ("a tenant", 512)):
            assert salted(own, salt) == found
            own.forget()


def test_records_belong_to_their_bundle_and_a_ruined_one_changes_the_text(model, place, expected, filled):
    """What is loaded is what attention reads: with a codec that gives back noise other tokens come out."""
    bundle = by_hand(model, [slots_of((0, 1, 2, 3))], bits=16)
    with connected(place, bundle) as own:
        assert own.generate(PROMPTS[:1], 16) == (expected[:1], [0])
        own.forget()
        assert own.generate(PROMPTS[:1], 16) == (expected[:1], [512])
    assert len(files(place)) == 4
    with connected(place, ruin(bundle)) as own:
        assert own.generate(PROMPTS[:1], 16) == (expected[:1], [0])
        own.forget()
        found = own.generate(PROMPTS[:1], 16)
    assert found.hits == [512]
    assert found.tokens != expected[:1]


def ruin(bundle: Bundle) -> Bundle:
    """The bundle with its decoders' rows mixed up."""
    blocks = []
    for block in bundle.blocks:
        tensors = block.tensors()
        tensors["decoder"] = tensors["decoder"][torch.randperm(len(tensors["decoder"]))]
        blocks.append(replace(block, codec=type(block.codec)(tensors["mean"], tensors["encoder"], tensors["decoder"])))
    return replace(limited(bundle, None), blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_load_failure_policy": "fail"}, "kv_load_failure_policy"),
        ({"kv_connector_extra_config": {"bundle": "x"}}, "kv_connector_extra_config must be"),
    ],
    ids=["policy", "options"],
)
def test_wrong_settings_are_refused(place, change, message):
    transfer = {
        "kv_connector": "KVCarConnector", "kv_connector_module_path": "kvcar.serve.vllm_connector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"bundle": "x", "folder": "y"},
    }  # fmt: skip
    with pytest.raises(Exception, match=message), engine(place[0], kv_transfer_config=transfer | change):
        pass
