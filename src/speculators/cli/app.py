"""The `speculators` command and its subcommands."""

from typing import Annotated

import typer

from speculators.cli import (
    batch,
    chat,
    convert,
    diff,
    doctor,
    evaluate,
    export,
    inspect,
    mtp,
    publish,
    record,
    validate,
)
from speculators.cli.command import Group
from speculators.cli.shared import share_options
from speculators.cli.signals import stop_on_signals

__all__ = ["app", "run"]

app = typer.Typer(
    name="speculators",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(convert.app, name="convert", short_help=convert.SHORT_HELP)
app.command()(batch.batch)
app.command()(inspect.inspect)
app.command()(validate.validate)
app.command()(diff.diff)
app.command()(evaluate.evaluate)
app.command()(record.record)
app.command()(chat.chat)
app.command()(export.export)
app.add_typer(mtp.app, name="mtp")
app.command()(publish.publish)
app.command()(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        from speculators import __version__

        typer.echo(f"speculators {__version__}")
        raise typer.Exit


@app.callback(
    epilog=(
        "Exit status: 0 done, 1 an error (explained in one sentence), 2 wrong usage, "
        "130 interrupted."
    )
)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Convert draft models to one standard format, prove them, and run them."""


share_options(app)  # after the last command is added


def run() -> None:
    """Run the command that the arguments name, and exit."""
    stop_on_signals()
    app()
