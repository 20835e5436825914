# pyright: reportMissingImports=false
"""How many tokens fit in vLLM's memory, by its own log: its own cache and bundles.

python benchmarks/serve_vllm.py --name capacity --model FOLDER -b fast-4x=bundles/fast-4x -b balanced-8x=bundles/balanced-8x

Runs in an environment with vLLM (``docs/engines.md``). Every contender is a process of its own with an engine inside.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer
from vllm_engines import (
    RESULTS,
    STOCK,
    Bundles,
    Fp8,
    Memory,
    Model,
    Name,
    Output,
    PassTokens,
    command,
    contenders,
    described,
    engine_options,
    environment,
)

from kvcar.record import Record, provenance
from kvcar.sizes import parse_bytes


def main(
    name: Name,
    model: Model,
    bundle: Bundles = None,
    memory: Memory = "1GiB",
    model_tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    dtype: str = "bfloat16",
    tokens_of_a_pass: PassTokens = "64",
    fp8: Fp8 = True,
    threads: int = 2,
    output: Output = RESULTS,
) -> None:
    """Start an engine for every contender and write one record."""
    given = {
        "model": model, "memory": parse_bytes(memory), "model_tokens": model_tokens, "dtype": dtype, "threads": threads,
    }  # fmt: skip
    caches = contenders(bundle or [], [int(each) for each in tokens_of_a_pass.split(",")], fp8)
    figures = {label: _in_process(given | own) for label, own in caches.items()}
    for own in figures.values():
        own["times_capacity"] = own["capacity_tokens"] / figures[STOCK]["capacity_tokens"]
    config = described(given, caches, name)
    output.mkdir(parents=True, exist_ok=True)
    Record("serve-vllm", {"contenders": figures}, config, provenance(command())).write(
        output / f"serve-vllm-{name}.json"
    )
    print(json.dumps(figures, indent=1))


def _in_process(given: dict[str, Any]) -> dict[str, Any]:
    own = [sys.executable, __file__, "contender", json.dumps(given)]
    variables = environment(given["threads"]) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(own, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def contender(given: dict[str, Any]) -> dict[str, Any]:
    """Start an engine for one contender and ask what fits."""
    from vllm import LLM

    llm = LLM(**engine_options(given, given["memory"], given["model_tokens"]), skip_tokenizer_init=True)
    cache = llm.llm_engine.vllm_config.cache_config
    return {"capacity_tokens": cache.kv_cache_size_tokens, "capacity_sequences": cache.kv_cache_max_concurrency}


if __name__ == "__main__":
    if sys.argv[1:2] == ["contender"]:
        print(json.dumps(contender(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
