"""A Sphinx extension that fills in pages from the code, so that they cannot drift: the API, the commands, the rooms.

A page says where with a line such as ``<!-- generated: commands -->``. Nothing is written to disk.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from typer.testing import CliRunner

import kvcar
from kvcar.cli import app as commands

MARKER = re.compile(r"^<!-- generated: ([\w.]+) -->$", re.MULTILINE)
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)\)")
PACKAGE = Path(kvcar.__file__).parent
ROOT = Path(__file__).parent.parent
HELP_COLUMNS = 110


def api(app: Sphinx) -> str:
    """Describe every public name, in its own words."""
    names = [name for name in kvcar.__all__ if not name.startswith("__")]
    return "\n\n".join(_described(app, name) for name in sorted(names, key=str.lower))


def _described(app: Sphinx, name: str) -> str:
    found = getattr(kvcar, name)
    if inspect.isclass(found):
        members = "" if issubclass(found, BaseException) else "\n   :members:"
        return _rst(f".. autoclass:: kvcar.{name}{members}")
    function = inspect.unwrap(found)  # packages that can be called keep the function of their name inside
    lines = GoogleDocstring(inspect.getdoc(function) or "", app.config, app, "function").lines()
    body = "\n".join(f"   {line}" for line in lines)
    return _rst(f".. py:function:: kvcar.{name}{_signature(function)}\n\n{body}")


class _Bare(str):
    """Words of a signature that are shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Give a signature with annotations as they are written, and functions by name."""
    bare = inspect.signature(function)
    parameters = [
        each.replace(
            annotation=_Bare(each.annotation),
            default=_Bare(each.default.__name__) if inspect.isfunction(each.default) else each.default,
        )
        for each in bare.parameters.values()
    ]
    return bare.replace(parameters=parameters, return_annotation=_Bare(bare.return_annotation))


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"


def command_pages(app: Sphinx) -> str:
    """Show ``--help`` of every command as a terminal does."""
    del app
    return "\n\n".join(
        f"## {name}\n\n```text\n{_help(name.split()[1:])}\n```" for name in ["kvcar", *_names(commands, "kvcar")]
    )


def _names(group: typer.Typer, prefix: str) -> Iterator[str]:
    listed = typer.main.get_command(group)
    context: Any = typer.Context(listed)
    for name in listed.list_commands(context):  # pyright: ignore[reportAttributeAccessIssue]
        yield f"{prefix} {name}"
        command = listed.get_command(context, name)  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(command, "list_commands"):
            yield from (f"{prefix} {name} {inner}" for inner in command.list_commands(context))


def _help(arguments: list[str]) -> str:
    variables = {"TERMINAL_WIDTH": str(HELP_COLUMNS), "COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(commands, [*arguments, "--help"], env=variables, prog_name="kvcar")
    if result.exit_code:
        raise RuntimeError(f"kvcar {' '.join(arguments)} --help failed: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def rooms(app: Sphinx) -> str:
    """List every module with the first sentence of its docstring."""
    del app
    rows = [f"| `{path.relative_to(PACKAGE)}` | {_purpose(path)} |" for path in sorted(PACKAGE.rglob("*.py"))]
    return "| file | what lives there |\n|---|---|\n" + "\n".join(rows)


def _purpose(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r"``", "`", " ".join(text.split("\n\n")[0].split())).replace("|", "\\|")


def root_page(app: Sphinx, name: str) -> str:
    """Take a document from the top of the repository, its links as the site needs them."""
    del app
    return LINK.sub(_moved, (ROOT / name).read_text(encoding="utf-8"))


def _moved(link: re.Match[str]) -> str:
    text, target = link.groups()
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    if target in ROOT_PAGES:
        return f"[{text}]({target.lower()})"
    return text if (ROOT / target).exists() else link[0]


PAGES: dict[str, Callable[[Sphinx], str]] = {"api": api, "commands": command_pages, "rooms": rooms} | {
    name: partial(root_page, name=name) for name in ("README.md", *ROOT_PAGES)
}


def fill_in(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace the markers of a page."""
    del name
    source[0] = MARKER.sub(lambda found: PAGES[found[1]](app), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True}
