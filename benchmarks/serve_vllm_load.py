"""A load of requests in a fixed memory of the cache: vLLM's own cache and bundles, in turn, several times over.

python benchmarks/serve_vllm_load.py TEXT --name demo --model FOLDER -b fast-4x=bundles/fast-4x -b balanced-8x=bundles/balanced-8x

Runs in an environment with vLLM (``docs/engines.md``). Every contender is vLLM's OpenAI server in a process of its own on the
loopback, which stays; in every turn vLLM's own benchmark client sends each the same requests, all at once, greedily. Ratios are
taken within a turn, as others may use the machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from vllm_engines import RESULTS, Bundles, Fp8, Memory, Model, Name, Output, PassTokens, command, contenders, described
from vllm_server import Server, server

from kvcar.record import Record, provenance
from kvcar.sizes import parse_bytes
from kvcar.text import read_text


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
        "new_tokens": new_tokens, "dtype": dtype, "threads": threads, "text": str(text), "client": "vllm.benchmarks.serve",
    }  # fmt: skip
    caches = contenders(bundle or [], [int(each) for each in tokens_of_a_pass.split(",")], fp8)
    prompts = _prompts(given)
    with ExitStack() as running:
        # All start beside each other; an error of one ends the others.
        servers = {
            label: running.enter_context(server(given | own, given["memory"], prompt_tokens + new_tokens))
            for label, own in caches.items()
        }
        figures = {label: _started(own, prompts) for label, own in servers.items()}
        for turn in range(turns):
            for label, own in servers.items():
                figures[label]["turns"].append(own.serve(prompts, new_tokens))
                print(turn, label, figures[label]["turns"][-1], flush=True)
    config = described(given, caches, name)
    output.mkdir(parents=True, exist_ok=True)
    record = Record("serve-vllm-load", {"contenders": figures}, config, provenance(command()))
    record.write(output / f"serve-vllm-load-{name}.json")


def _started(own: Server, prompts: list[list[int]]) -> dict[str, Any]:
    """Say what fits a server that has started and is warm."""
    own.wait()
    own.serve(prompts[:1], 2)  # kernels are compiled, memory is touched
    tokens, sequences = own.capacity()
    return {"capacity_tokens": tokens, "capacity_sequences": sequences, "turns": []}


def _prompts(given: dict[str, Any]) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(given["model"])(read_text(Path(given["text"])).text[:4_000_000])["input_ids"]
    count = given["prompt_tokens"]
    return [ids[i * count : (i + 1) * count] for i in range(given["requests"])]


if __name__ == "__main__":
    typer.run(main)
