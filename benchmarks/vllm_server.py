# pyright: reportMissingImports=false
"""vLLM's OpenAI server in a process of its own on the loopback, and vLLM's own benchmark client; for ``serve_vllm_load.py``."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_engines import engine_options, environment

_HOST = "127.0.0.1"
_NAME = "m"
_START_SECONDS = 1200
_STOP_SECONDS = 60
_METRIC = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Server:
    """A running server.

    Args:
        process: it runs in.
        url: of it.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process, self.url = process, url

    def capacity(self) -> tuple[int, float]:
        """Tokens and sequences that fit, as vLLM counts them."""
        _, labels, _ = next(each for each in _METRIC.findall(self._metrics()) if each[0] == "cache_config_info")
        said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        return int(said["kv_cache_size_tokens"]), float(said["kv_cache_max_concurrency"])

    def serve(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Send all prompts at once, greedily, from an empty prefix cache; what the client saw and what the server counted."""
        _get(f"{self.url}/reset_prefix_cache", b"")
        before, cpu = self._counters(), self._cpu_seconds()
        with self._running() as at_once:
            seen = asyncio.run(_client(self.url, prompts, new_tokens))
        after = self._counters()
        if seen["total_output_tokens"] != len(prompts) * new_tokens:
            raise RuntimeError(f"not all requests were answered in full: {[each for each in seen['errors'] if each]}")
        between = sorted(seconds for each in seen["itls"] for seconds in each)
        return {
            "seconds": seen["duration"], "cpu_seconds": self._cpu_seconds() - cpu,
            "preemptions": after["num_preemptions_total"] - before["num_preemptions_total"],
            "new_tokens_per_second": seen["output_throughput"], "most_at_once": max(at_once),
            "passes": after["iteration_tokens_total_count"] - before["iteration_tokens_total_count"],
            "seconds_to_first_token": sorted(seen["ttfts"]), "seconds_between_tokens": _middle_and_tail(between),
        }  # fmt: skip

    def wait(self) -> None:
        """Wait until it answers; raises RuntimeError where it ends before."""
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"a server ended with status {self._process.returncode} before it answered")
            try:
                _get(f"{self.url}/health")
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"a server did not answer in {_START_SECONDS} s")

    def _metrics(self) -> str:
        return _get(f"{self.url}/metrics")

    def _counters(self) -> dict[str, int]:
        return {name: int(float(value)) for name, _, value in _METRIC.findall(self._metrics()) if value[0].isdigit()}

    def _cpu_seconds(self) -> float:
        """Seconds of all cores that the server's processes had so far."""
        import psutil

        own = psutil.Process(self._process.pid)
        return sum(sum(each.cpu_times()[:2]) for each in [own, *own.children(recursive=True)])

    @contextmanager
    def _running(self) -> Iterator[list[int]]:
        """Look every second how many requests run."""
        seen, done = [0], threading.Event()

        def look() -> None:
            while not done.wait(1):
                seen.append(self._counters()["num_requests_running"])

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()


@contextmanager
def server(given: dict[str, Any], memory: int, tokens: int) -> Iterator[Server]:
    """Start a server for one contender; end it and all its processes at the end.

    Args:
        given: the model, its dtype, threads, and what the contender is.
        memory: bytes of the cache.
        tokens: of a sequence at most.
    """
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    own = {"host": _HOST, "port": port, "served_model_name": _NAME} | engine_options(given, memory, tokens)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_arguments(own)]
    variables = environment(given["threads"]) | {"VLLM_SERVER_DEV_MODE": "1"}  # to empty the prefix cache
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Server(process, f"http://{_HOST}:{port}")
        except BaseException:
            with open(log.name, errors="replace") as written:
                print(*written.readlines()[-40:], sep="", file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _arguments(options: dict[str, Any]) -> list[str]:
    """Options of an engine as a command line."""
    found: list[str] = []
    for name, value in options.items():
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


async def _client(url: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Let vLLM's benchmark client send prompts at once, and give what it measured."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    return await benchmark(
        task_type=TaskType.GENERATION, endpoint_type="openai", api_url=f"{url}/v1/completions", base_url=url,
        model_id=_NAME, model_name=_NAME, tokenizer=None,
        input_requests=[SampleRequest(prompt, len(prompt), new_tokens, request_id=str(i)) for i, prompt in enumerate(prompts)],
        logprobs=None, request_rate=float("inf"), burstiness=1.0, disable_tqdm=True, num_warmups=0, profile=False,
        selected_percentile_metrics=["ttft", "itl"], selected_percentiles=[95.0], ignore_eos=True, goodput_config_dict={},
        max_concurrency=None, lora_modules=None, extra_headers=None, extra_body={"temperature": 0}, ready_check_timeout_sec=0,
    )  # fmt: skip


def _middle_and_tail(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile of sorted figures."""
    last = len(seconds) - 1
    return {name: seconds[round(share * last)] for name, share in (("median", 0.5), ("p95", 0.95))}


def _get(url: str, data: bytes | None = None) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
        return answer.read().decode()
