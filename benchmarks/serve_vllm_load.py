# pyright: reportMissingImports=false
"""A load of requests in a fixed memory of the cache: vLLM's own cache and bundles, in turn, several times over.

python benchmarks/serve_vllm_load.py TEXT --name demo --model FOLDER -b fast-4x=bundles/fast-4x -b balanced-8x=bundles/balanced-8x

Runs in an environment with vLLM (``docs/engines.md``). Every contender is a process of its own with an engine inside, which stays; in
every turn each serves the same requests, given all at once, greedily. Ratios are taken within a turn, as others may use the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from vllm_engines import (
    RESULTS,
    Bundles,
    Fp8,
    Memory,
    Model,
    Name,
    Output,
    PassTokens,
    capacity,
    command,
    contenders,
    described,
    engine,
    environment,
)

from kvcar.record import Record, provenance
from kvcar.sizes import parse_bytes
from kvcar.text import read_text

_SAYS = "kvcar-load "


def main(
    text: Annotated[Path, typer.Argument(help="A .txt or .jsonl file that prompts are cut from.")],
    name: Name,
    model: Model,
    bundle: Bundles = None,
    memory: Memory = "64MiB",
    turns: Annotated[int, typer.Option(help="How often each contender serves the load.")] = 3,
    requests: int = 8,
    prompt_tokens: int = 960,
    new_tokens: int = 64,
    dtype: str = "bfloat16",
    tokens_of_a_pass: PassTokens = "64",
    fp8: Fp8 = True,
    threads: int = 2,
    output: Output = RESULTS,
) -> None:
    """Let all contenders serve in turn and write one record."""
    given = {
        "model": model, "memory": parse_bytes(memory), "turns": turns, "requests": requests, "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens, "dtype": dtype, "threads": threads, "text": str(text),
    }  # fmt: skip
    caches = contenders(bundle or [], [int(each) for each in tokens_of_a_pass.split(",")], fp8)
    servers = {label: _Server(given | own) for label, own in caches.items()}
    figures: dict[str, dict[str, Any]] = {label: own.heard() | {"turns": []} for label, own in servers.items()}
    for turn in range(turns):
        for label, own in servers.items():
            figures[label]["turns"].append(own.serve())
            print(turn, label, figures[label]["turns"][-1], flush=True)
    for own in servers.values():
        own.stop()
    config = described(given, caches, name)
    output.mkdir(parents=True, exist_ok=True)
    record = Record("serve-vllm-load", {"contenders": figures}, config, provenance(command()))
    record.write(output / f"serve-vllm-load-{name}.json")


class _Server:
    """A process with an engine for one contender, which serves the load whenever it is told to."""

    def __init__(self, given: dict[str, Any]) -> None:
        own = [sys.executable, __file__, "contender", json.dumps(given)]
        self._process = subprocess.Popen(
            own, env=environment(given["threads"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def heard(self) -> dict[str, Any]:
        """Wait for what the process has to say next."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_SAYS):
                return json.loads(line.removeprefix(_SAYS))
        raise RuntimeError(
            f"a contender ended with status {self._process.wait()} before it was done; its errors are above"
        )

    def serve(self) -> dict[str, Any]:
        """Serve the load once."""
        assert self._process.stdin is not None
        print("serve", file=self._process.stdin, flush=True)
        return self.heard()

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()


def contender(given: dict[str, Any]) -> None:
    """Start an engine and serve the load for every line of the standard input."""
    llm = engine(given, given["memory"], given["prompt_tokens"] + given["new_tokens"])
    tokens, sequences = capacity(llm)
    prompts = _prompts(given)
    _serve(llm, prompts[:1], 2)  # kernels are compiled, memory is touched
    print(_SAYS + json.dumps({"capacity_tokens": tokens, "capacity_sequences": sequences}), flush=True)
    for _ in sys.stdin:
        print(_SAYS + json.dumps(_serve(llm, prompts, given["new_tokens"])), flush=True)


def _prompts(given: dict[str, Any]) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(given["model"])(read_text(Path(given["text"])).text[:4_000_000])["input_ids"]
    count = given["prompt_tokens"]
    return [{"prompt_token_ids": ids[i * count : (i + 1) * count]} for i in range(given["requests"])]


def _serve(llm: Any, prompts: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Serve all prompts at once, greedily, from an empty prefix cache."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache")
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    preempted, running = _preemptions(llm), _Running(llm)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    made = sum(len(each.outputs[0].token_ids) for each in outputs)
    return {
        "seconds": seconds, "cpu_seconds": running.cpu_seconds(), "preemptions": _preemptions(llm) - preempted,
        "new_tokens_per_second": made / seconds, "most_at_once": running.most, "passes": running.passes,
        "seconds_to_first_token": sorted(each.metrics.first_token_latency for each in outputs),
    }  # fmt: skip


class _Running:
    """Counts passes and the requests that run at once, until its figures are asked for."""

    def __init__(self, llm: Any) -> None:
        self.most, self.passes, self._engine = 0, 0, llm.llm_engine
        self._step, self._began = self._engine.step, time.process_time()
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._engine.step = self._counted

    def cpu_seconds(self) -> float:
        """Stop counting, and give the seconds of all cores that this process had since it began."""
        del self._engine.step
        return time.process_time() - self._began

    def _counted(self) -> Any:
        made = self._step()
        self.passes += 1
        self.most = max(self.most, len(self._scheduler.running))
        return made


def _preemptions(llm: Any) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


if __name__ == "__main__":
    if sys.argv[1:2] == ["contender"]:
        contender(json.loads(sys.argv[2]))
    else:
        typer.run(main)
