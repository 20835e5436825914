"""Engines of vLLM in this process, over tiny models; for tests that run where vLLM is installed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import torch
from tiny import token_ids
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.v1.attention import selector

from kvcar.bundle import Bundle
from kvcar.geometry import Slot
from kvcar.kernels.attend import cpu

# Engines that several tests share are made before the fixture that says the same for a test.
cpu.IN_8_BITS = False
POSITIONS = 1024
MEMORY = 8 << 20


class Generated(NamedTuple):
    """What an engine made of prompts."""

    tokens: list[list[int]]
    hits: list[int]  # prompt tokens that were found in the prefix cache


class Engine(NamedTuple):
    """A running engine."""

    llm: LLM

    def generate(self, prompts: list[list[int]], tokens: int = 40) -> Generated:
        """Greedy tokens after every prompt."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return Generated([list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs])

    def scores(self, prompts: list[list[int]]) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest first tokens after every prompt."""
        sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprobs=5)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [{token: own.logprob for token, own in o.outputs[0].logprobs[0].items()} for o in outputs]

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    @property
    def preemptions(self) -> int:
        """Requests that had to make room and were computed again, so far."""
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self.llm.llm_engine.vllm_config

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return self.config.cache_config.num_gpu_blocks


@contextmanager
def engine(
    model: Path, bundle: Path | None = None, own: dict[str, Any] | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine for a model in a folder, stock or with a bundle; ``own`` are further options of kvcar's."""
    if bundle is not None:
        kvcar = {"bundle": str(bundle)} | (own or {})
        options |= {"attention_backend": "CUSTOM", "additional_config": {"kvcar": kvcar}}
    selector._cached_get_attn_backend.cache_clear()  # it takes no notice of additional options
    given = {"kv_cache_memory_bytes": MEMORY, "max_model_len": POSITIONS, "dtype": "float32", "seed": 0} | options
    llm = LLM(
        model=str(model), skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **given
    )  # fmt: skip
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def saved(model: PreTrainedModel, bundle: Bundle | None, folder: Path) -> tuple[Path, Path | None]:
    """Folders of a model and a bundle."""
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
    if bundle is None:
        return folder / "model", None
    return folder / "model", bundle.save_pretrained(folder / f"bundle-{bundle.digest[:8]}", overwrite=True)


def slots(
    layers: list[int], kinds: tuple[str, ...] = ("key", "value"), heads: tuple[int, ...] = (0, 1)
) -> tuple[Slot, ...]:
    """Slots of a block, of all the given layers, kinds and heads."""
    return tuple(Slot(layer, head, kind) for layer in layers for kind in kinds for head in heads)  # pyright: ignore[reportArgumentType]


def prompt(length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    return token_ids(length, seed=seed)[0].tolist()


PLAIN = [prompt(length, seed) for seed, length in enumerate((10, 63, 64, 65, 130, 200, 600))]
MANY = [prompt(100 + 20 * i, i) for i in range(8)]
DIVERGING = [PLAIN[-1][:shared] + prompt(20, 50 + shared) for shared in (100, 300, 512, 599)]


def expected_of(model: PreTrainedModel, prompts: list[list[int]], tokens: int = 40) -> list[list[int]]:
    """The model's greedy tokens after every prompt, by transformers."""
    made = []
    for own in prompts:
        ids = torch.tensor([own])
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        made.append(out[0, len(own) :].tolist())
    return made
