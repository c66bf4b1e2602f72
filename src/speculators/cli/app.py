"""The `speculators` command: its subcommands, its log, and how errors leave it."""

import sys
from typing import Annotated

import typer
from loguru import logger

from speculators import __version__
from speculators.cli import convert, export
from speculators.errors import SpeculatorsError

__all__ = ["app", "main"]

app = typer.Typer(
    name="speculators",
    help="Convert EAGLE drafts to one standard format, prove them, and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(convert.app, name="convert")
app.command()(export.export)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"speculators {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Convert EAGLE drafts to one standard format, prove them, and run them."""


def main() -> None:
    """Run the command line; exits with 0, 1 (an error, told in a sentence), 2 (usage) or 130."""
    logger.remove()
    debug = "--debug" in sys.argv
    logger.add(
        sys.stderr,
        level="DEBUG" if debug else "INFO",
        format="<green>{time:YYYY-MM-DD HH:mm:ss}</green> | <level>{level: <8}</level> | {message}",
    )
    try:
        app()
    except SpeculatorsError as error:
        if debug:
            raise
        logger.error(str(error))
        sys.exit(1)
    except OSError as error:  # a disk or a file system that fails where nothing expects it
        if debug:
            raise
        logger.error(f"{error}.")
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("Interrupted.")
        sys.exit(130)
