"""Compressed caches used for long and at random, against what they should hold, with an eye on memory.

python benchmarks/soak.py requests                  1,000 requests in the README's form
python benchmarks/soak.py threads                   several threads generate on one attached model, again and again
python benchmarks/soak.py operations --minutes 30   random operations on many caches, each beside one of transformers
"""

from __future__ import annotations

import copy
import ctypes
import gc
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, Gemma3TextConfig, GPT2Config, LlamaConfig

import kvcar
from kvcar.errors import CacheStateError
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions, Structure
from kvcar.models.structure import cache_argument
from kvcar.plan import CacheConfig
from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"
_VOCABULARY, _POSITIONS = 128, 512
_CACHE = CacheConfig(window=32, page_tokens=32)
# Root mean square of the difference over the logits' own: float noise of lossless pages, and of 8 bits, where a single token may
# lie far off that stands between two others; a cache that holds other tokens gives 1 or more.
_LOSSLESS, _CODED = 2e-5, 0.6
_SLOTS = 6
_LONGEST = 420
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_WIDE: dict[str, Any] = _SHAPE | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": _POSITIONS,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_WIDE),
    "gpt2": lambda: GPT2Config(**_SHAPE, n_embd=64, n_layer=3, n_head=4, n_positions=_POSITIONS),
    "gemma3": lambda: Gemma3TextConfig(
        **_WIDE, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=24,
        query_pre_attn_scalar=16,
    ),
}  # fmt: skip

app = typer.Typer(add_completion=False, no_args_is_help=True)
Output = Annotated[Path, typer.Option(help="Folder of the record.")]


def tiny(family: str) -> Any:
    """A random model of a family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def coded(model: Any, bits: int = 8) -> kvcar.Bundle:
    """A bundle that codes all layers that can be."""
    ids = tokens(256, 8, random.Random(7))
    options = FitOptions(structure=Structure(codec="linear", bits=bits), cache=_CACHE)
    return next(fit_bundles(model, ids, [options]))


def tokens(count: int, batch: int, chance: random.Random) -> Tensor:
    """Random token ids int64 ``[batch, count]``."""
    return torch.tensor([[chance.randrange(3, _VOCABULARY) for _ in range(count)] for _ in range(batch)])


def resident_bytes() -> int:
    """Memory of this process after everything that can be has been given back; pieces that the allocator keeps are in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


_MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


def allocated_bytes() -> int:
    """What of this process's memory is in use, by the allocator's own account (glibc's, from 2.33 on)."""
    give = ctypes.CDLL(None).mallinfo2
    give.restype = _MallInfo
    found = give()
    return found.uordblks + found.hblkhd


@app.command()
def requests(count: int = 1000, warm_up: int = 100, output: Output = RESULTS) -> None:
    """Answer requests as the README does, by ``generate`` and with a cache made of a bundle's folder, in turn."""
    model, chance = tiny("llama"), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = coded(model).save_pretrained(Path(folder) / "bundle")
        with kvcar.attach(model, path):
            seen = []
            for request in range(count + warm_up):
                if request >= warm_up and (request - warm_up) % (count // 10) == 0:
                    seen.append(resident_bytes())
                own = {} if request % 2 else cache_argument(model, kvcar.KVCarCache(path))
                model.generate(tokens(120, 1, chance), **own, max_new_tokens=16, do_sample=False)
            seen.append(resident_bytes())
    figures = {"requests": count, "resident_bytes": seen, "growth_bytes": seen[-1] - seen[0]}
    Record("soak-requests", figures, {"model": "tiny llama", "warm_up": warm_up}).write(output / "soak-requests.json")
    print(f"{count} requests: {figures['growth_bytes']:,} bytes more than after the first {warm_up}")


@app.command()
def threads(rounds: int = 20, runs: int = 60, workers: int = 4, output: Output = RESULTS) -> None:
    """Generate on one attached model in several threads, every text compared with what one thread alone gives."""
    model, chance = tiny("llama"), random.Random(0)
    prompts = [tokens(30 + 4 * index, 1, chance) for index in range(runs)]

    def answer(prompt: Tensor) -> Tensor:
        return model.generate(prompt, max_new_tokens=40, do_sample=False)

    with kvcar.attach(model, coded(model)):
        expected = [answer(prompt) for prompt in prompts]
        right = []
        for _ in range(rounds):
            with ThreadPoolExecutor(workers) as pool:
                found = list(pool.map(answer, prompts))
            right.append(sum(map(torch.equal, found, expected)))
    figures = {"rounds": rounds, "runs": runs, "right": right}
    Record("soak-threads", figures, {"model": "tiny llama", "workers": workers}).write(output / "soak-threads.json")
    print(f"{rounds} rounds of {runs} in {workers} threads: {min(right)} right or more")


class Mismatch(Exception):
    """A compressed cache that does not hold what it should."""


@dataclass
class Slot:
    """A cache beside the one of transformers that has seen the same.

    Attributes:
        host: whose model they are of.
        cache, plain: the two.
        mask: attention mask int64 ``[B, tokens]``.
    """

    host: Host
    cache: kvcar.KVCarCache
    plain: Cache
    mask: Tensor

    @property
    def tokens(self) -> int:
        """Tokens in both."""
        return self.mask.shape[1]


@dataclass
class Host:
    """An attached model and what of it is compared.

    Attributes:
        name: family and bundle.
        model: attached.
        bundle: that it is attached with.
        tolerance: of the root mean square of differences.
        worst: largest so far.
    """

    name: str
    model: Any
    bundle: kvcar.Bundle
    tolerance: float
    worst: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, slot: Slot, count: int, seed: int) -> None:
        """One pass of both over the same tokens; raises Mismatch where they say something else."""
        batch, before = slot.mask.shape[0], slot.tokens
        ids = tokens(count, batch, random.Random(seed))
        mask = torch.cat([slot.mask, torch.ones(batch, count, dtype=torch.int64)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, before:]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        mode = torch.inference_mode if seed % 3 == 0 else torch.no_grad
        with mode():
            got = self.model(**given, **cache_argument(self.model, slot.cache)).logits
        with torch.no_grad():
            expected = self.model(**given, **cache_argument(self.model, slot.plain)).logits
        slot.mask = mask
        self.compare(got, expected)
        if slot.cache.tokens != slot.tokens or slot.cache.batch_size != batch:
            raise Mismatch(
                f"{self.name}: {slot.cache.tokens} tokens of {slot.cache.batch_size} instead of {slot.tokens}"
            )

    def compare(self, got: Tensor, expected: Tensor) -> None:
        """Note how far apart logits are; raises Mismatch beyond the tolerance."""
        apart = float((got - expected).square().mean().sqrt() / expected.std())
        with self.lock:
            self.worst = max(self.worst, apart)
        if not apart <= self.tolerance:
            raise Mismatch(f"{self.name}: logits differ by {apart:.2g} of their size")


class Soak:
    """Random operations on slots.

    Args:
        seed: of everything.
    """

    def __init__(self, seed: int) -> None:
        self.chance, self.done, self.slots = random.Random(seed), Counter[str](), list[Slot]()
        self.folder = tempfile.TemporaryDirectory()
        self.hosts = []
        for family in FAMILIES:
            for lossless in (True, False):
                model = tiny(family)
                bundle = kvcar.lossless(model, cache=_CACHE) if lossless else coded(model)
                kvcar.attach(model, bundle)
                name = f"{family}, {'lossless' if lossless else '8 bits'}"
                self.hosts.append(Host(name, model, bundle, _LOSSLESS if lossless else _CODED))

    def run(self, until: Callable[[], bool], every: int) -> list[tuple[int, int]]:
        """Do operations until it is time; give resident and allocated bytes with no cache at all after every so many."""
        memory = []
        while not until():
            self.operation()
            if sum(self.done.values()) % every == 0:
                self.slots.clear()
                memory.append((resident_bytes(), allocated_bytes()))
        return memory

    def operation(self) -> None:
        """Do one at random."""
        if len(self.slots) < _SLOTS:
            name, operation = "new", self.new
        else:
            names = (
                "step", "step", "chunk", "chunk", "crop", "reorder", "repeat", "select", "fork", "flush", "store", "reset",
                "interrupt", "threads", "generate", "drop",
            )  # fmt: skip
            name = self.chance.choice(names)
            operation = getattr(self, name)
        operation()
        self.done[name] += 1

    def new(self) -> None:
        """A batch comes in, perhaps padded."""
        host, batch = self.chance.choice(self.hosts), self.chance.choice((1, 1, 2, 3))
        window = self.chance.choice((None, 0, 64))
        slot = Slot(
            host, kvcar.KVCarCache(host.bundle, window), DynamicCache(config=host.model.config),
            torch.ones(batch, 0, dtype=torch.int64),
        )  # fmt: skip
        padding = self.chance.choice((0, 0, 5, 40)) if batch > 1 else 0
        if padding:
            slot.mask = torch.ones(batch, 60, dtype=torch.int64)
            slot.mask[0, :padding] = 0
            self.first_pass(slot)
        self.slots.append(slot)
        self.advance(slot, self.chance.randrange(1, 120))

    def first_pass(self, slot: Slot) -> None:
        """Feed a padded prompt; what is said of padding is not compared."""
        host, mask = slot.host, slot.mask
        ids = tokens(mask.shape[1], mask.shape[0], self.chance)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        with torch.no_grad():
            got, expected = (
                host.model(**given, **cache_argument(host.model, cache)).logits for cache in (slot.cache, slot.plain)
            )
        host.compare(got[mask.bool()], expected[mask.bool()])

    def advance(self, slot: Slot, count: int) -> None:
        """A pass, unless the sequence has become too long, which goes."""
        if slot.tokens + count > _LONGEST:
            self.slots.remove(slot)
        else:
            slot.host.step(slot, count, self.chance.randrange(10**6))

    def any_slot(self) -> Slot:
        """One at random."""
        return self.chance.choice(self.slots)

    def step(self) -> None:
        """Some single tokens."""
        slot = self.any_slot()
        for _ in range(self.chance.randrange(1, 6)):
            if slot in self.slots:
                self.advance(slot, 1)

    def chunk(self) -> None:
        """Many tokens at once."""
        self.advance(self.any_slot(), self.chance.randrange(2, 100))

    def crop(self) -> None:
        """Forget the latest tokens, where both can; a refusal changes nothing."""
        slot = self.any_slot()
        count = self.chance.randrange(1, max(2, slot.tokens - int((slot.mask == 0).sum(-1).max())))
        sliding = slot.host.name.startswith("gemma3") and slot.tokens >= 24
        if count >= slot.tokens:
            return
        try:
            slot.cache.crop(-count)
        except CacheStateError:
            paged = min(slot.tokens - count, slot.cache.paged_tokens)
            reaches = 0 < paged < int((slot.mask == 0).sum(-1).max()) + slot.cache.plan.sinks
            if not (sliding or reaches):
                raise
            self.done["crop refused"] += 1
            return
        if sliding:
            raise Mismatch("a sliding layer was cropped beyond its window")
        slot.plain.crop(-count)
        slot.mask = slot.mask[:, :-count]
        self.advance(slot, 1)

    def _map(self, slot: Slot, change: Callable[[Any], None], index: Tensor) -> None:
        change(slot.cache)
        change(slot.plain)
        slot.mask = slot.mask[index]
        self.advance(slot, 1)

    def reorder(self) -> None:
        """Beams change places."""
        slot = self.any_slot()
        batch = slot.mask.shape[0]
        index = torch.tensor([self.chance.randrange(batch) for _ in range(batch)])
        self._map(slot, lambda cache: cache.reorder_cache(index), index)

    def repeat(self) -> None:
        """Sequences become several, up to a few."""
        slot = self.any_slot()
        batch = slot.mask.shape[0]
        if batch <= 2:
            self._map(slot, lambda cache: cache.batch_repeat_interleave(2), torch.arange(batch).repeat_interleave(2))

    def select(self) -> None:
        """Some sequences leave the batch."""
        slot = self.any_slot()
        batch = slot.mask.shape[0]
        index = torch.tensor(sorted(self.chance.sample(range(batch), self.chance.randrange(1, batch + 1))))
        self._map(slot, lambda cache: cache.batch_select_indices(index), index)

    def fork(self) -> None:
        """A prefix is shared; both go on."""
        slot = self.any_slot()
        twin = Slot(slot.host, copy.deepcopy(slot.cache), copy.deepcopy(slot.plain), slot.mask)
        self.slots.append(twin)
        self.advance(slot, self.chance.randrange(1, 40))
        self.advance(twin, self.chance.randrange(1, 40))
        if len(self.slots) > _SLOTS:
            self.slots.pop(0)

    def flush(self) -> None:
        """The window is coded."""
        slot = self.any_slot()
        slot.cache.flush_window()
        self.advance(slot, 1)

    def store(self) -> None:
        """Save, and go on from the file."""
        slot = self.any_slot()
        path = Path(self.folder.name) / "context"
        slot.cache.save(path, keep_window=self.chance.random() < 0.5)
        slot.cache = kvcar.KVCarCache.load(path, slot.host.model)
        self.advance(slot, self.chance.randrange(1, 40))

    def reset(self) -> None:
        """Use a cache for another batch."""
        slot = self.any_slot()
        slot.cache.reset()
        slot.plain = DynamicCache(config=slot.host.model.config)
        slot.mask = torch.ones(self.chance.choice((1, 2)), 0, dtype=torch.int64)
        self.advance(slot, self.chance.randrange(1, 80))

    def interrupt(self) -> None:
        """A pass breaks off; sliding layers that have stored cannot go back and are let go of."""
        slot = self.any_slot()
        sliding = slot.host.name.startswith("gemma3")
        layers = next(m for m in slot.host.model.modules() if isinstance(m, torch.nn.ModuleList))
        handle = layers[0 if sliding else 1].register_forward_pre_hook(lambda *_: 1 / 0)
        ids = tokens(3, slot.mask.shape[0], self.chance)
        mask = torch.cat([slot.mask, torch.ones_like(ids)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, slot.tokens :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        try:
            with torch.no_grad():
                slot.host.model(**given, **cache_argument(slot.host.model, slot.cache))
            raise Mismatch("a pass that was to break off did not")
        except ZeroDivisionError:
            pass
        finally:
            handle.remove()
        self.advance(slot, 1)

    def threads(self) -> None:
        """Several slots go on at once, a thread each."""
        chosen = [slot for slot in self.slots if slot.tokens + 40 <= _LONGEST]
        work = [(slot, self.chance.randrange(1, 40), self.chance.randrange(10**6)) for slot in chosen]
        with ThreadPoolExecutor(len(work) or 1) as pool:
            list(pool.map(lambda each: each[0].host.step(*each), work))

    def generate(self) -> None:
        """A request by ``generate``; where its text parts from the plain one's, the choice must have been a near tie."""
        host = self.chance.choice(self.hosts)
        if host.tolerance > _LOSSLESS:
            return
        ids, beams = tokens(self.chance.randrange(2, 150), 2, self.chance), self.chance.choice((1, 1, 2))
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True}
        options |= {"output_scores": True, "attention_mask": torch.ones_like(ids)}
        found = host.model.generate(ids, **options)
        plain = DynamicCache(config=host.model.config)
        expected = host.model.generate(ids, **options, **cache_argument(host.model, plain))
        for got, right in zip(found.scores, expected.scores, strict=True):
            finite = right.isfinite()
            host.compare(got[finite], right[finite])
        if not torch.equal(found.sequences, expected.sequences):
            raise Mismatch(f"{host.name}: another text of equal scores")

    def drop(self) -> None:
        """A batch leaves."""
        self.slots.remove(self.any_slot())


@app.command()
def operations(minutes: float = 30.0, seed: int = 0, every: int = 500, output: Output = RESULTS) -> None:
    """Do random operations for some minutes; the record has how many of which, the largest differences and memory."""
    torch.set_num_threads(1)
    soak, began = Soak(seed), time.monotonic()
    config = {"minutes": minutes, "seed": seed, "every": every, "hosts": [host.name for host in soak.hosts]}
    try:
        memory = soak.run(lambda: time.monotonic() - began > 60 * minutes, every)
    finally:
        count = sum(soak.done.values())
        print(f"{count} operations: {dict(sorted(soak.done.items()))}", file=sys.stderr)
    resident, allocated = map(list, zip(*memory, strict=True)) if memory else ([], [])
    figures = {
        "operations": count,
        "by_operation": dict(sorted(soak.done.items())),
        "largest_difference": {host.name: host.worst for host in soak.hosts},
        "resident_bytes": resident,
        "allocated_bytes": allocated,
        "resident_growth_bytes_per_1000_operations": growth(resident, every),
        "allocated_growth_bytes_per_1000_operations": growth(allocated, every),
    }
    Record("soak-operations", figures, config).write(output / "soak-operations.json")
    grown = growth(resident, every), growth(allocated, every)
    print(
        f"memory grew by {grown[0]:,.0f} bytes per 1,000 operations, {grown[1]:,.0f} of them in use; differences: ",
        end="",
    )
    print(figures["largest_difference"])


def growth(seen: list[int], every: int) -> float:
    """Bytes more per 1,000 operations, from a quarter of the run on."""
    settled = seen[len(seen) // 4 :] or [0]
    return 1000 * (settled[-1] - settled[0]) / max(1, every * (len(settled) - 1))


if __name__ == "__main__":
    app()
