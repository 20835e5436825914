"""The demo's page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


@dataclass(frozen=True)
class PageRow:
    """One cache in the page's table; figures as they are to be shown."""

    name: str
    times_smaller: str
    stored_bytes_per_token: str
    codec_bytes: str
    pays_from_tokens: str
    perplexity: str
    perplexity_ratio: str
    kl_divergence: str
    same_top: str


@dataclass(frozen=True)
class PageTable:
    """Caches on one kind of text."""

    heading: str
    rows: Sequence[PageRow]


@dataclass(frozen=True)
class GeneratedText:
    """A continuation and what its cache took."""

    name: str
    text: str
    detail: str


def render_page(
    title: str,
    facts: Mapping[str, str],
    tables: Sequence[PageTable],
    plots: Mapping[str, str],
    prompt: str,
    texts: Sequence[GeneratedText],
    notes: Sequence[str],
) -> str:
    """Fill in the page's HTML.

    Args:
        title: of the page.
        facts: what was run, name to value.
        tables: one for each kind of text.
        plots: heading to SVG.
        prompt: what the texts continue.
        texts: continuations to show side by side.
        notes: sentences below the tables.
    """
    environment = Environment(loader=PackageLoader("kvcar", "report"), autoescape=select_autoescape(["html", "j2"]))
    given: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "tables": tables,
        "plots": plots,
        "prompt": prompt,
        "texts": texts,
        "notes": notes,
    }
    return environment.get_template("page.html.j2").render(given)
