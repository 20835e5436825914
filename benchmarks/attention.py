"""Attention of one decode step over a compressed past, against exact attention over full keys and values.

python benchmarks/attention.py --name cpu

One layer, no model: codes, keys and values are random. Everyone reads memory that no cache still holds, as a model's
other layers would have left it. For GPUs see ``gpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from speed.ceilings import copy_bytes_per_second, matmul_flop_per_second
from speed.device import device_config, seconds_of, use_threads
from speed.figures import ratios, spread
from speed.rounds import in_rounds
from speed.synthetic import RandomPast, Shape, random_bundle, random_plan
from torch.nn.functional import scaled_dot_product_attention

from kvcar.errors import InputError, KVCarError
from kvcar.kernels.attend import ATTENTION
from kvcar.kernels.backend import BACKENDS
from kvcar.models.load import DTYPES
from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"
Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """Calls that take turns over copies of the same amount of memory, and what one of them reads and computes."""

    calls: list[Callable[[], object]]
    bytes_read: int
    operations: int
    dtype: str


def main(
    name: Annotated[str, typer.Option(help="Of the record.")],
    shape: Annotated[str, typer.Option(help="Query heads,KV heads,head dim.")] = "32,8,128",
    contexts: str = "8192,32768",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    block_heads: Annotated[int, typer.Option(min=1, help="Heads coded together.")] = 8,
    latents: Annotated[int, typer.Option(min=1, help="Of a block.")] = 512,
    bits: Annotated[int, typer.Option(min=1, max=8, help="Of a latent.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the queries that kvcar gets.")] = "float32",
    backend: Annotated[str, typer.Option(help=", ".join(BACKENDS))] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    calls: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 3,
    cold_mib: Annotated[
        int, typer.Option(min=1, help="Memory that a contender reads before it reads the same again.")
    ] = 256,
    threads: int | None = None,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Time everyone in turn at each context, and the device's own limits in the same run; one record."""
    use_threads(threads)
    torch.manual_seed(seed)
    where, form, attend = torch.device("cpu"), Shape.parse(shape), _backend(backend)
    lengths = _lengths(contexts)
    computed = dtype if backend == "triton" else "float32"  # the others widen their queries
    ceilings = {
        "copy_bytes_per_second": copy_bytes_per_second(where),
        "matmul_flop_per_second": {
            kind: matmul_flop_per_second(where, DTYPES[kind]) for kind in ("float32", "bfloat16")
        },
    }
    rows = []
    for tokens in lengths:
        plan = random_plan(form, tokens, block_heads, latents, bits)
        past = RandomPast(random_bundle(plan), tokens, batch, DTYPES[dtype], where)
        contenders = {f"kvcar {backend}": _compressed(past, attend, cold_mib * 2**20, computed)}
        for kind in ("bfloat16", "float32"):
            contenders[f"SDPA {kind}"] = _full(form, tokens, batch, kind, where, cold_mib * 2**20)
        rows.append({"context": tokens, "contenders": _timed(contenders, rounds, calls, seed, where, ceilings)})
        _print(rows[-1])
    config = {
        "name": name, "shape": asdict(form), "contexts": lengths, "batch": batch, "block_heads": block_heads, "latents": latents,
        "bits": bits, "dtype": dtype, "backend": backend, "rounds": rounds, "calls": calls, "cold_mib": cold_mib, "seed": seed,
        **device_config(where),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    Record("attention", {"attention": rows, "ceilings": ceilings}, config).write(output / f"attention-{name}.json")


def _lengths(given: str) -> list[int]:
    try:
        return [int(each) for each in given.split(",")]
    except ValueError:
        raise InputError(f"contexts are numbers with commas between them, got {given!r}") from None


def _backend(name: str) -> Attend:
    """Find the implementation of a decode step by its backend's name."""
    found = {backend: own.run for (backend, case), own in ATTENTION.importable().items() if case == "step"}
    if name not in found:
        raise InputError(f"the backend is one of {', '.join(found)}; got {name!r}")
    return found[name]


def _compressed(past: RandomPast, attend: Attend, cold_bytes: int, dtype: str) -> Contender:
    scaling = past.query().shape[-1] ** -0.5
    copies = -(-cold_bytes // past.bytes_read())
    calls: list[Callable[[], object]] = [partial(attend, past.query(), *past.past(), scaling) for _ in range(copies)]
    return Contender(calls, past.bytes_read(), past.operations(), dtype)


def _full(shape: Shape, tokens: int, batch: int, dtype: str, device: torch.device, cold_bytes: int) -> Contender:
    def new(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, shape.head_dim, dtype=DTYPES[dtype], device=device)

    elements = 2 * batch * shape.kv_heads * tokens * shape.head_dim
    copies = -(-cold_bytes // (elements * DTYPES[dtype].itemsize))
    calls: list[Callable[[], object]] = [
        partial(
            scaled_dot_product_attention,
            new(shape.query_heads, 1),
            new(shape.kv_heads, tokens),
            new(shape.kv_heads, tokens),
            enable_gqa=shape.query_heads != shape.kv_heads,
        )
        for _ in range(copies)
    ]
    operations = 4 * batch * shape.query_heads * tokens * shape.head_dim
    return Contender(calls, elements * DTYPES[dtype].itemsize, operations, dtype)


@torch.no_grad()
def _timed(
    contenders: dict[str, Contender], rounds: int, calls: int, seed: int, device: torch.device, ceilings: dict[str, Any]
) -> dict[str, Any]:
    turns = {name: _turn(contender, calls, device) for name, contender in contenders.items()}
    for turn in turns.values():
        turn()  # kernels are compiled and chosen before anything counts
    seconds = in_rounds(turns, rounds, seed)
    sums = {name: [sum(each) for each in given] for name, given in seconds.items()}
    found = {}
    for name, contender in contenders.items():
        each = [second for turn in seconds[name] for second in turn]
        speed, flops = contender.bytes_read / median(each), contender.operations / median(each)
        found[name] = {
            "step": spread([1000 * second for second in each]).as_dict("_ms"),
            "ratio_to": {o: ratios(sums[name], sums[o]).as_dict() for o in contenders if o.startswith("SDPA")},
            "bytes_read": contender.bytes_read,
            "operations": contender.operations,
            "bytes_per_second": speed,
            "flop_per_second": flops,
            "share_of_copy": speed / ceilings["copy_bytes_per_second"],
            "share_of_matmul": flops / matmul_ceiling(ceilings["matmul_flop_per_second"], contender.dtype),
            "dtype": contender.dtype,
        }
    return found


def matmul_ceiling(by_dtype: dict[str, float], dtype: str) -> float:
    """What to measure a kernel by: one that is given bfloat16 may compute in float32 where that is faster."""
    return by_dtype["float32"] if dtype == "float32" else max(by_dtype.values())


def _turn(contender: Contender, calls: int, device: torch.device) -> Callable[[], list[float]]:
    waiting = cycle(contender.calls)
    return lambda: [seconds_of(next(waiting), device) for _ in range(calls)]


def _print(row: dict[str, Any]) -> None:
    for name, each in row["contenders"].items():
        print(
            f"{row['context']:>7} {name:<14} {each['step']['median_ms']:9.3f} ms  {each['bytes_per_second'] / 1e9:8.3f} GB/s "
            f"({100 * each['share_of_copy']:.0f} %)  {each['flop_per_second'] / 1e9:8.1f} GFLOP/s ({100 * each['share_of_matmul']:.0f} %)",
            flush=True,
        )


if __name__ == "__main__":
    try:
        typer.run(main)
    except KVCarError as error:
        raise SystemExit(f"error: {error}") from None
