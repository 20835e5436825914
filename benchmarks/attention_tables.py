"""Sections of ``docs/results/decode.md`` from the records of ``attention.py``. Called by ``decode_tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_READING = """One layer's attention of a decode step: random codes, keys and values, and in each call memory that was not read in the
calls just before, as a model's other layers would leave it. "Read" counts the bytes that a step must read (codes and exact part, or
full keys and values) per second, as a share of what copying reaches here (read and written); "computed" counts the multiplications
and additions of the method as it stands (for compressed caches: decoding keys, scores, summing values as latents), as a share of what
a matrix product reaches, in float32, or for bfloat16 in whichever of the two is faster; the C kernel multiplies bytes to decode keys, so
that it may go beyond that. Sinks and window are part of the context."""


def attention_sections() -> list[str]:
    """All sections; none without records."""
    records = load("attention-*.json", "attention")
    if not records:
        return []
    return ["## Attention alone", _READING, *(part for r in records for part in _record(r))]


def _record(r: dict[str, Any]) -> list[str]:
    c, shape = r["config"], r["config"]["shape"]
    matmul = ", ".join(
        f"{kind} {flops / 1e9:,.3g} GFLOP/s" for kind, flops in r["ceilings"]["matmul_flop_per_second"].items()
    )
    about = (
        f"{shape['query_heads']} query heads, {shape['kv_heads']} KV heads of {shape['head_dim']}, batch {c['batch']}; blocks of "
        f"{c['block_heads']} heads with {c['latents']} latents of {c['bits']} bits; {c['device']}, {c['usable_cores']} usable cores, "
        f"{c['threads']} threads; {c['rounds']} rounds of {c['calls']} calls. Reached here: copying "
        f"{r['ceilings']['copy_bytes_per_second'] / 1e9:,.1f} GB/s, matrix products {matmul}. Record: `{r['record']}`"
    )
    return [f"### {c['name']}", about, _table(r)]


def _table(r: dict[str, Any]) -> str:
    rivals = list(next(iter(r["attention"][0]["contenders"].values()))["ratio_to"])
    rows = [["context", "attention", "ms", *(f"time relative to {rival}" for rival in rivals), "read", "computed"]]
    for at in r["attention"]:
        for name, each in at["contenders"].items():
            reads = f"{each['bytes_per_second'] / 1e9:.3g} GB/s ({100 * each['share_of_copy']:.0f} %)"
            computes = f"{each['flop_per_second'] / 1e9:.3g} GFLOP/s ({100 * each['share_of_matmul']:.0f} %)"
            relative = (_range(each["ratio_to"][rival]) for rival in rivals)
            rows.append([f"{at['context']:,}", name, _range(each["step"], "_ms"), *relative, reads, computes])
    return markdown(rows)


def _range(s: dict[str, float], unit: str = "") -> str:
    return f"{s['median' + unit]:.2f} ({s['lower_quartile' + unit]:.2f}-{s['upper_quartile' + unit]:.2f})"
