"""``kvcar demo``: the whole of it on a small real model, in a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .app import app
from .console import out, progress_bars

_EXAMPLES = """Fit, measure and try a compressed cache on SmolLM2-135M, and write a page about it.

The first run downloads 98 MB. Everything goes into one folder, by default ./kvcar-demo.

[bold]Examples[/]

  kvcar demo

  kvcar demo --output /tmp/demo
"""


@app.command(help=_EXAMPLES)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the page, the figures and the bundles go.")
    ] = Path("kvcar-demo"),
) -> None:
    """Run the demo; the help text says what it does."""
    from ..report.demo import run_demo, write_demo
    from ..sizes import codecs_in_words
    from .figures import fidelity_table

    _prepare(output)
    with progress_bars() as tell:
        found = run_demo(tell)
    page = write_demo(found, output)
    for kind, results in found.fidelity.items():
        out.print(f"\n[bold]{kind}[/]: {found.texts[kind].name}", highlight=False)
        out.print(fidelity_table(results))
    out.print(codecs_in_words(found.compressed.plan, found.compressed.codec_bytes), highlight=False)
    for name, text in found.generated.items():
        out.print(f"\n[bold]{name}[/] ({text.cache_bytes:,} bytes of cache):")
        out.print(text.text.strip(), markup=False, highlight=False)
    out.print(f"\n[bold]{page}[/] has the tables, the plots and the texts; took {found.seconds:.0f} s", highlight=False)


def _prepare(output: Path) -> None:
    """Make the folder before any work is done."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".kvcar-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; choose another folder with --output") from None
