"""The application that commands register with, and how ``--help`` groups them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..version import __version__

PANELS = {
    "Fit, measure, use": ("fit", "fit-structure", "eval", "tasks", "generate", "size", "inspect", "demo"),
    "Contexts on disk": ("save",),
    "KV-CAR as published": ("paper",),
}
"""Commands in the order in which a user meets them, by what the user does."""


class _Grouped(TyperGroup):
    """Lists commands by panel, in the panel's order."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all commands; those of no panel come last."""
        del ctx
        ordered = [name for names in PANELS.values() for name in names if name in self.commands]
        return ordered + [name for name in self.commands if name not in ordered]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command, with the panel that lists it."""
        command: Any = super().get_command(ctx, cmd_name)
        panel = next((panel for panel, names in PANELS.items() if cmd_name in names), None)
        if command is not None and panel is not None:
            command.rich_help_panel = panel
        return command


app = typer.Typer(
    name="kvcar",
    cls=_Grouped,
    help="Make the KV cache of a Hugging Face causal language model several times smaller, and see what it costs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def option_names() -> dict[str, str]:
    """Map the Python names of all options of all commands to how a user writes them."""
    names: dict[str, str] = {}

    def collect(command: Any) -> None:
        for parameter in command.params:
            longest = max(parameter.opts, key=len)
            if longest.startswith("--"):
                names.setdefault(parameter.name, longest)
        for inner in getattr(command, "commands", {}).values():
            collect(inner)

    collect(typer.main.get_command(app))
    return names


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcar {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the bare command."""
    del version
