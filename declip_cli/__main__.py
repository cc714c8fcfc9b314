"""The Typer app and its commands."""

import os
from typing import Annotated

import typer

from declip_cli import __version__
from declip_cli.cli.doctor import doctor
from declip_cli.cli.export import export
from declip_cli.cli.inspect import inspect
from declip_cli.cli.linear_probe import linear_probe
from declip_cli.cli.prepare import prepare
from declip_cli.cli.pretrain import pretrain
from declip_cli.cli.report import report
from declip_cli.cli.retrieve import retrieve
from declip_cli.cli.zeroshot import zeroshot

app = typer.Typer(
    name="declip",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time that help takes
    help="Pre-train CLIP-style models from few image-text pairs, and evaluate them.",
    epilog="A first run, with the data that comes with declip: `declip pretrain --data demo`",
)
for command in (prepare, pretrain, zeroshot, linear_probe, retrieve, export, inspect, report):
    app.command(no_args_is_help=True)(command)
app.command()(doctor)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"declip {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options that come before a command; only --version."""


def main() -> None:
    """Run the command line; the entry point `declip`."""
    # Threads that wait actively stall each other as soon as something else needs a core; OpenMP reads this once,
    # when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # When a rank is killed, the others' torch prints C++ stack traces; what has happened is said in words.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    app()


if __name__ == "__main__":
    main()
