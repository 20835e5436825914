"""``docs/results/gpu-instructions.md`` from the records of ``gpu_instructions.py``. Called by ``tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_HEAD = """# Instructions of a decode step on an H100

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. **Counted in machine code that was compiled for sm_90; never
run on a GPU.** One layer of one sequence at Llama-3.1-8B's shape (32 query heads, 8 KV heads of 128), bfloat16 queries, all tokens in pages of 64.

"Issue" is what 132 multiprocessors with four schedulers take to issue all warp instructions, one a cycle each; "busiest unit" what the slowest
of the units takes at its own rate (a multiprocessor's lanes a cycle: 64 for integers, 128 for floats, 16 for conversions, 32 for loads and
stores). No H100 can be faster with this code at this clock; waiting for memory, conflicts and barriers come on top. Reading a bfloat16
cache of this length, 128 MiB, takes 40 us at 3.35 TB/s.

`bytes` are the kernels as they were when they read planes byte by byte, counted in the same way; `words` as they are."""
_UNITS = ("integer", "integer multiply", "float", "conversion", "global load and store", "shared load and store")
_REST = ("matrix", "uniform", "control and other")


def gpu_instructions_page() -> str:
    """The whole page."""
    records = load("gpu-instructions-*.json", "gpu_instructions")
    return "\n\n".join([_HEAD, *(part for r in records for part in _record(r))]) + "\n"


def _record(r: dict[str, Any]) -> list[str]:
    config = r["config"]
    shapes = "; ".join(
        f"`{name}`: blocks of {heads} head{'s' * (heads > 1)}, keys of {_latents(keys)}, values of {_latents(values)}"
        for name, (heads, keys, values) in config["shapes"].items()
    )
    about = f"{config['tokens']:,} tokens, {config['clock_hz'] / 1e9:g} GHz. {shapes}. Record: `{r['record']}`"
    return [f"## {config['name']}", about, _table(r["shapes"])]


def _latents(bits: dict[str, int]) -> str:
    count = sum(bits.values())
    mean = sum(int(each) * number for each, number in bits.items()) / count
    return f"{count} latents of {mean:.2f} bits"


def _table(shapes: dict[str, Any]) -> str:
    rows = [["shape", "kernel", "warps", "registers", "spilled bytes", "shared KiB"]]
    rows[0] += ["million warp instructions", "issue, us", "busiest unit, us", *_UNITS, *_REST]
    for shape, kernels in shapes.items():
        for k in kernels:
            unit, slowest = max(k["unit_us"].items(), key=lambda item: item[1])
            executed = k["warp_instructions"]
            rows.append([
                shape, f"`{k['kernel']}`", str(k["warps"]), str(k["registers"]), str(k["spilled_bytes"]),
                f"{k['shared_bytes'] / 1024:.0f}", f"{k['warp_instructions_total'] / 1e6:.1f}", f"{k['issue_us']:.1f}",
                f"{slowest:.1f} ({unit})", *(f"{executed.get(name, 0) / 1e6:.2f}" for name in (*_UNITS, *_REST)),
            ])  # fmt: skip
        total = [sum(k[name] for k in kernels) for name in ("warp_instructions_total", "issue_us")]
        rows.append([shape, "both", "", "", "", "", f"{total[0] / 1e6:.1f}", f"**{total[1]:.1f}**", *[""] * 10])
    return markdown(rows)
