"""``docs/results/families.md`` from the record of ``families.py``. Called by ``tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_HEAD = """# Families of models

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. A tiny random model of every decoder that transformers
{version} knows by name (`benchmarks/families.py`): lossless pages against the model's own cache over a prefill in chunks, steps and a padded
batch; then a fit, and codes of 8 bits run the same way.

- **works**: every layer whose cache grows with the text is coded, and logits are the model's own but for sums in another order.
- **partly**: some of those layers stay the model's own.
- **refused**: said before anything is captured, with the reason.
- **does not run by itself**: not over the cache of transformers, or not without packages or sizes that this table does without.

Layers that slide over fewer than 512 tokens, and layers that keep a state (linear attention, Mamba, convolutions), stay the model's own; their
cache does not grow. Tiny models slide over 32, but for those of Mistral, Ministral, Moshi and Kolibri, whose layers all do: they slide over 512,
which is coded."""

_ORDER = (
    "works",
    "partly",
    "wrong",
    "another's exception",
    "refused late",
    "refused",
    "too slow",
    "ended",
    "does not run by itself",
)


def families_page() -> str:
    """The page, whatever records there are of it."""
    records = load("families*.json", "families")
    version = records[0]["provenance"]["transformers"] if records else ""
    return "\n\n".join([_HEAD.format(version=version), *(part for r in records for part in _parts(r))]) + "\n"


def _parts(r: dict[str, Any]) -> list[str]:
    parts = []
    for own in r["config"].get("updated", []):
        names = ", ".join(f"`{name}`" for name in own["names"])
        parts.append(f"Tried anew on {own['date'][:10]}, at commit {str(own['commit'])[:7]}: {names}.")
    for mapping, found in r["families"].items():
        if not found:
            continue
        counts = r["counts"][mapping]
        summary = ", ".join(f"{counts[result]} {result}" for result in _ORDER if result in counts)
        rows = [["name", "result", "layers", "largest error", "KL at 8 bits", "reason"]]
        for each in sorted(found, key=lambda each: (_ORDER.index(each["result"]), each["name"])):
            rows.append(_row(each))
        parts += [f"## Names in the mapping of {mapping} models: {len(found)}\n\n{summary}.", markdown(rows)]
    return parts


def _row(each: dict[str, Any]) -> list[str]:
    layers = ", ".join(f"{count} {kind}" for kind, count in each.get("layers", {}).items() if count)
    error, kl = (each.get(name) for name in ("lossless_error", "kl"))
    figures = ["" if figure is None else f"{figure:.1g}" for figure in (error, kl)]
    reason = each.get("message", "").replace("|", "\\|").replace("<", "&lt;")
    return [f"`{each['name']}`", each["result"], layers, *figures, reason[:240]]
