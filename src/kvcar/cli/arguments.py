"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'demo', a local folder, a .gguf file, or a hub id (id@revision).")
]
BundlePath = Annotated[Path, typer.Option("--bundle", "-b", metavar="BUNDLE", help="Folder that 'kvcar fit' wrote.")]
BundleSource = Annotated[
    str,
    typer.Option("--bundle", "-b", metavar="BUNDLE", help="Folder that 'kvcar fit' wrote, or a hub id (id@revision)."),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A .txt file, or a .jsonl file with a field 'text'. Default: English text that ships with Python.",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A .txt file, or a .jsonl file with a field 'text' ([:500] after its name takes 500 lines); may be repeated. "
        "Default: English text that ships with Python, to which a fit adds code.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        metavar="TOKENS",
        help="Recent tokens kept exact, a multiple of the page size; 0 codes every past token. Default: the bundle's.",
    ),
]
Context = Annotated[int | None, typer.Option(help="Tokens of a window. Default: 2048, or what the model has.")]
Windows = Annotated[int, typer.Option(help="Windows, spread evenly over the text.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures, with their provenance, as JSON.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; auto is float32 on a CPU, the checkpoint's own on a GPU.")
]
Device = Annotated[str, typer.Option(help="Where to run, as torch names it; auto takes a GPU where there is one.")]
