"""vLLM's OpenAI server with kvcar's cache, in processes of its own on the loopback, and the benchmark that drives it."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import words_tokenizer
from tiny import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/engines makes an environment for these tests")

from vllm_engine import DIVERGING, PLAIN, POSITIONS, expected_of, prompt, saved
from vllm_server import Server, server

import kvcar
from kvcar.plan import CacheConfig

NEW = 30


def sent(own: Server, **body):
    """The answer to one request, still open."""
    data = json.dumps({"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True} | body)
    return urllib.request.urlopen(
        urllib.request.Request(f"{own.url}/v1/completions", data.encode(), {"Content-Type": "application/json"}),
        timeout=300,
    )


def completed(own: Server, ids, **body):
    with sent(own, prompt=ids, **{"max_tokens": NEW} | body) as answer:
        return [choice["token_ids"] for choice in json.load(answer)["choices"]]


def aborted(own: Server, ids):
    """Hang up in the middle of a stream."""
    with sent(own, prompt=ids, max_tokens=300, stream=True) as answer:
        answer.readline()


def test_a_server_serves_many_clients(tmp_path):
    model = tiny_model(head_dim=32, max_position_embeddings=POSITIONS)
    where, bundle = saved(model, kvcar.lossless(model, cache=CacheConfig(page_tokens=64, window=64, sinks=4)), tmp_path)
    words_tokenizer().save_pretrained(where)
    prompts = [*PLAIN, *DIVERGING]
    expected = [[own] for own in expected_of(model, prompts, NEW)]
    given = {"model": str(where), "dtype": "float32", "threads": 1, "bundle": str(bundle), "max_num_batched_tokens": 64}
    with server(given, 16 << 20, POSITIONS) as own, ThreadPoolExecutor(12) as clients:
        own.wait()
        assert list(clients.map(lambda ids: completed(own, ids), prompts)) == expected
        list(clients.map(lambda seed: aborted(own, prompt(500, seed)), range(6)))
        assert list(clients.map(lambda ids: completed(own, ids), prompts)) == expected
        assert len(completed(own, prompts[0], n=3, temperature=1)) == 3
        assert own.capacity()[0] > POSITIONS
        # vLLM's own client, as the benchmark uses it.
        seen = own.serve([prompt(300, seed) for seed in range(4)], 8)
        assert seen["new_tokens_per_second"] == pytest.approx(32 / seen["seconds"])
        assert len(seen["seconds_to_first_token"]) == 4
        assert 0 < seen["seconds_between_tokens"]["median"] <= seen["seconds_between_tokens"]["p95"] < seen["seconds"]
        assert (seen["preemptions"], seen["passes"] >= 4 * 300 // 64, seen["cpu_seconds"] > 0) == (0, True, True)
