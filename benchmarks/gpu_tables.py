"""``docs/results/gpu.md`` from the records of ``gpu.py``, once there are any. Called by ``tables.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pages import load, markdown

_HEAD = """# On GPUs

Generated from the records in `benchmarks/results/` that `benchmarks/gpu.py` wrote, by `benchmarks/tables.py`. Weights, codecs and codes
are random: this is about speed, memory and whether the kernels compute what they should, not about quality. Codes have latents by bits
as fits gave them. Ranges in brackets are quartiles."""
_ATTENTION = """One layer's attention of a decode step, as eager calls and recorded in a CUDA graph (which leaves out launching). Every call
reads memory that was not read in the calls just before. "Read" is what a step must read (codes and exact part, or full keys and
values), per second and as a share of the larger of two bandwidths that are measured here: of copying, and of reading alone. PyTorch's
attention runs by each of its backends, with query heads that share KV heads by its own option ("heads"), or as rows of their KV
head ("rows"); the fastest of all is what others are compared with."""
_BATCH = """Largest batch that could be prefilled and decoded with so much memory beside weights and codecs, activations counted. "Reckoned" is
the arithmetic of `kvcar size`, which knows of caches alone, and where the search begins."""


def gpu_pages() -> dict[str, str]:
    """File name below ``docs/results`` -> content; nothing where there are no records of a whole run on a GPU."""
    runs = [r for r in load("gpu-*-run.json", "gpu-run") if not r["config"]["rehearsal"]]
    sections = [part for r in runs for part in run_sections(r)]
    return {"gpu.md": "\n\n".join([_HEAD, *sections]) + "\n"} if sections else {}


def run_sections(run: dict[str, Any]) -> list[str]:
    """All sections of one run."""
    name, versions = run["config"]["name"], run["provenance"]
    about = (
        f"{versions['device']}; PyTorch {versions['torch']}, transformers {versions['transformers']}, kvcar at "
        f"`{(versions['commit'] or 'unknown')[:10]}`{'' if versions['tree_clean'] else ' with changes'}; {versions['date'][:10]}."
    )
    rows = [["part", "ended", "seconds", "why"]]
    rows += [[part, own["ended"], f"{own['seconds']:.0f}", own["reason"]] for part, own in run["parts"].items()]
    sections = [f"## {name}", about, markdown(rows)]
    for part, write in _PARTS.items():
        for r in load(f"gpu-{name}-{part}.json", "gpu"):
            unfinished = "" if r["complete"] else "Stopped before it was done; this is what it had found."
            sections += [f"### {part.capitalize()}", unfinished, *write(r), f"Record: `{r['record']}`"]
    return [section for section in sections if section]


def _basics(r: dict[str, Any]) -> list[str]:
    does = "multiplies" if r["multiplies_subnormals"] else "does **not** multiply"
    rows = [["queries", "query rows of a KV head", "largest difference from the specification", "within tolerance"]]
    for each in r["small_products"]:
        worst = each.get("error") or f"{each['worst']:.2g}"
        rows.append([each["dtype"], str(each["rows"]), worst, "yes" if each.get("right") else "**no**"])
    return [f"The device {does} subnormal float16 numbers exactly.", markdown(rows), *_kernels(r)]


def _kernels(r: dict[str, Any]) -> list[str]:
    """What the compiler made of what ran; each variant once."""
    columns = ("kernel", "warps", "registers", "spilled", "shared_bytes")
    found = sorted({tuple(str(each[column]) for column in columns) for each in r.get("kernels", [])})
    head = ["kernel", "warps", "registers", "spilled registers", "shared memory (bytes)"]
    return [markdown([head, *([f"`{name}`", *rest] for name, *rest in found)])] if found else []


def _attention(r: dict[str, Any]) -> list[str]:
    speeds = ", ".join(f"{what} {speed / 1e9:,.0f} GB/s" for what, speed in r["bytes_per_second"].items())
    reached = f"Reached here: {speeds}; products of bfloat16 {r['matmul_flop_per_second'] / 1e12:,.0f} TFLOP/s."
    rows = [["context", "batch", "calls", "attention", "us", "relative to the fastest of PyTorch", "read"]]
    failed = [["context", "batch", "attention", "why it did not run"]]
    for at in r["lengths"]:
        where = [f"{at['tokens']:,}", str(at["batch"])]
        for how in ("eager", "recorded"):
            for name, each in at.get(how, {}).get("contenders", {}).items():
                speed = f"{each['bytes_per_second'] / 1e9:,.0f} GB/s ({100 * each['share_of_bandwidth']:.0f} %)"
                fastest = " (fastest)" if name == at[how]["fastest"] else ""
                relative = _range(each["ratio_to_fastest"]) if "ratio_to_fastest" in each else ""
                rows.append([*where, how, name + fastest, _range(each, "_us", 1), relative, speed])
        failed += [[*where, name, why] for name, why in at["failed"].items()]
    return [_ATTENTION, reached, markdown(rows), markdown(failed) if len(failed) > 1 else "", *_kernels(r)]


def _model(r: dict[str, Any]) -> list[str]:
    m = r["config"]["sizes"]["model"]
    codecs = ", ".join(f"`{name}` {size / 1e6:,.1f} MB" for name, size in r["codec_bytes"].items())
    about = (
        f"{m['layers']} layers, {m['hidden']} wide, {m['query_heads']} query heads, {m['kv_heads']} KV heads of {m['head_dim']}; weights of "
        f"{r['weight_bytes'] / 1e9:,.1f} GB, codecs: {codecs}. Batch {r['config']['sizes']['batch']}, prefill in chunks of "
        f"{r['config']['sizes']['chunk']:,}."
    )
    names = list(r["decode"][0]["contenders"])
    head = [f"{at['context']:,}" for at in r["decode"]]
    step = [["a decode step, ms", *head]]
    ratio = [["relative to `DynamicCache`", *head]]
    for name in names:
        each = [at["contenders"][name] for at in r["decode"]]
        step.append([f"`{name}`", *(_range(row["step"], "_ms") for row in each)])
        ratio.append([f"`{name}`", *(_range(row["ratio_to_full"]) for row in each)])
    prefill = [["prefill", "tokens per second", "time relative to `DynamicCache`"]]
    for name, row in r["prefill"]["contenders"].items():
        prefill.append([f"`{name}`", f"{row['tokens_per_second']:,.0f}", f"{row['time_ratio_of_sums']:.2f}"])
    return [about, markdown(step), markdown(ratio), markdown(prefill), *_profile(r.get("profile", {}))]


def _profile(profiles: dict[str, Any]) -> list[str]:
    rows = [["cache", "a step under the profiler, ms", "of it the device computes, ms", "longest"]]
    for name, each in profiles.items():
        if "error" in each:
            rows.append([f"`{name}`", "", "", each["error"]])
            continue
        longest = ", ".join(f"{kernel[:40]} {ms:.2f}" for kernel, ms in list(each["longest_ms"].items())[:4])
        rows.append([f"`{name}`", f"{each['step_ms_while_profiled']:.2f}", f"{each['device_ms']:.2f}", longest])
    return [markdown(rows)] if profiles else []


def _tests(r: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in r["outcomes"].items()) or "none came to an end"
    rows = [["failed", "why"], *([f"`{name}`", why] for name, why in r["failed"].items())]
    return [f"The kernels' own tests, run natively: {counts}.", markdown(rows) if len(rows) > 1 else ""]


def _encoding(r: dict[str, Any]) -> list[str]:
    rows = [["profile", "tokens", "`triton`, us", "`torch`, us", "`triton` relative to `torch`"]]
    for each in r["layers"]:
        times = (_range(each[way], "_us", 0) for way in ("triton", "torch"))
        rows.append([each["profile"], f"{each['tokens']:,}", *times, _range(each["triton_to_torch"])])
    return ["Encoding a layer's tokens into pages.", markdown(rows), *_kernels(r)]


def _batch(r: dict[str, Any]) -> list[str]:
    s = r["config"]["sizes"]
    rows = [[f"sequences of {s['tokens']:,} tokens in {s['memory_bytes'] / 2**30:.3g} GiB", "reckoned", "found"]]
    rows[0] += ["bytes of caches", "a step, ms", "tokens per second"]
    for name, each in r["caches"].items():
        largest = each["largest"]
        found = ["none of those tried", "", "", ""]
        if largest is not None:
            found = [f"{largest['batch']:,}", f"{largest['held_bytes']:,}", _range(largest["step"], "_ms", 1)]
            found.append(f"{largest['tokens_per_second']:,.0f}")
        rows.append([f"`{name}`", f"{each['reckoned']:,}", *found])
    return [_BATCH, markdown(rows)]


def _range(s: dict[str, float], unit: str = "", digits: int = 2) -> str:
    middle, low, high = (f"{s[part + unit]:,.{digits}f}" for part in ("median", "lower_quartile", "upper_quartile"))
    return f"{middle} ({low}-{high})"


_PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "basics": _basics,
    "attention": _attention,
    "model": _model,
    "encoding": _encoding,
    "batch": _batch,
    "tests": _tests,
}
