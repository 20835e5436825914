"""Decode steps and prefill of a model 1B wide through transformers: its own cache, and kvcar's with random codecs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from speed.compiled import compiled_kernels
from speed.race import Pace, grow, time_steps
from speed.runners import Runner, bundle_runners, full_runner, twin
from speed.summary import decode_figures, prefill_figures
from speed.synthetic import coded_plan, random_bundle
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvcar.bundle import Bundle
from kvcar.cache.attach import attach
from kvcar.models.geometry import read_geometry

from . import Figures, Sizes, reason
from .codes import codes_for

_PROFILED_STEPS = 3
_KERNELS = 12


def sizes(rehearse: bool) -> Sizes:
    """A model as wide as Llama-3.2-1B, and what it decodes."""
    if rehearse:
        model = {
            "hidden": 32,
            "intermediate": 64,
            "layers": 1,
            "query_heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
            "vocabulary": 64,
        }
        return {
            "model": model,
            "contexts": [132],
            "batch": 1,
            "rounds": 2,
            "steps": 1,
            "chunk": 132,
            "profiles": ["fast"],
        }
    model = {
        "hidden": 2048,
        "intermediate": 8192,
        "layers": 16,
        "query_heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "vocabulary": 128_256,
    }
    return {
        "model": model, "contexts": [1024, 8192, 32_768], "batch": 1, "rounds": 4, "steps": 8, "chunk": 2048,
        "profiles": ["fast", "balanced"],
    }  # fmt: skip


def random_model(device: torch.device, sizes: Sizes) -> PreTrainedModel:
    """A Llama of random weights in bfloat16."""
    torch.manual_seed(0)
    m = sizes["model"]
    config = LlamaConfig(
        hidden_size=m["hidden"], intermediate_size=m["intermediate"], num_hidden_layers=m["layers"], head_dim=m["head_dim"],
        num_attention_heads=m["query_heads"], num_key_value_heads=m["kv_heads"], vocab_size=m["vocabulary"],
        max_position_embeddings=131_072, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def random_bundles(model: PreTrainedModel, profiles: Sequence[str]) -> dict[str, Bundle]:
    """Bundles of random codecs, by profile."""
    geometry = read_geometry(model.config)
    return {name: random_bundle(coded_plan(geometry, codes_for(name, geometry)), model) for name in profiles}


def random_ids(device: torch.device, sizes: Sizes, batch: int, tokens: int) -> Tensor:
    """Token ids int64 ``[batch, tokens]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, sizes["model"]["vocabulary"], (batch, tokens), generator=generator).to(device)


@torch.no_grad()
def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package."""
    model, pace = random_model(device, sizes), Pace(sizes["rounds"], sizes["steps"], sizes["chunk"])
    bundles = random_bundles(model, sizes["profiles"])
    ids = random_ids(device, sizes, sizes["batch"], sizes["contexts"][-1] + pace.tokens + _PROFILED_STEPS)
    plain = twin(model)
    with attach(model, next(iter(bundles.values()))):
        runners = [full_runner(plain), *bundle_runners(model, bundles)]
        families = {runner.name: runner.family for runner in runners}
        found: Figures = {
            "codec_bytes": {name: bundle.codec_bytes for name, bundle in bundles.items()},
            "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        }
        for runner in runners:
            runner.warm_up(ids, min(sizes["chunk"], ids.shape[1] // 3))
        timings, chunks = [], []
        for context in sizes["contexts"]:
            chunks += grow(runners, ids, context, pace)
            timings.append(time_steps(runners, ids, pace, static=False, tell=lambda line: print(line, flush=True)))
            found |= decode_figures(timings, families, pace.tokens) | prefill_figures(runners, chunks, sizes["batch"])
            found["kernels"] = compiled_kernels()
            yield found
        if device.type == "cuda":
            found["profile"] = {runner.name: _profiled(runner, ids) for runner in runners}
    yield found


def _profiled(runner: Runner, ids: Tensor) -> dict[str, Any]:
    """Share of decode steps in which the device computes, and what it computes longest."""
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            seconds = runner.decode(ids[:, runner.fed : runner.fed + _PROFILED_STEPS])
        times = {event.key: event.self_device_time_total / 1000 / len(seconds) for event in seen.key_averages()}
    except Exception as error:
        return {"error": reason(error)}
    longest = sorted(times, key=lambda name: -times[name])[:_KERNELS]
    return {
        "step_ms_while_profiled": 1000 * sum(seconds) / len(seconds),
        "device_ms": sum(times.values()),
        "longest_ms": {name: round(times[name], 4) for name in longest},
    }
