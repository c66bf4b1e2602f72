"""What every command shares: --quiet and --debug, the log, and how errors leave it.

Exit statuses: 0, done; 1, an error, told in one sentence; 2, the command line was not
understood; 130, interrupted by Ctrl-C; 143, stopped by SIGTERM.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from loguru import logger

from speculators.errors import SpeculatorsError

__all__ = ["share_options"]

FORMAT = "<green>{time:YYYY-MM-DD HH:mm:ss}</green> | <level>{level: <8}</level> | {message}"

SHARED_OPTIONS = tuple(
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
    for name, option in {
        "quiet": typer.Option("--quiet", "-q", help="Log nothing but errors."),
        "debug": typer.Option("--debug", help="Log every detail, and show tracebacks."),
    }.items()
)


def share_options(app: typer.Typer) -> None:
    """Give --quiet and --debug to every command of ``app`` and of its groups, and obey them."""
    for info in app.registered_commands:
        if info.callback is not None:
            info.callback = _sharing(info.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            share_options(group.typer_instance)


def _sharing(command: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a command: typer takes its options from the signature."""

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, debug: bool, **options: Any) -> None:
        if quiet and debug:
            raise typer.BadParameter("--quiet and --debug exclude each other.")
        _start_log("ERROR" if quiet else "DEBUG" if debug else "INFO")
        try:
            command(*arguments, **options)
        except (SpeculatorsError, OSError) as error:
            # An OSError of another class: a disk or a file system that fails where nothing
            # expects it. A reader of a pipe that went away is no error: typer sees to it.
            if debug or isinstance(error, BrokenPipeError):
                raise
            logger.error(str(error) if isinstance(error, SpeculatorsError) else f"{error}.")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            logger.error("Interrupted.")
            raise typer.Exit(130) from None

    signature = inspect.signature(command, eval_str=True)
    parameters = [*signature.parameters.values(), *SHARED_OPTIONS]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _start_log(level: str) -> None:
    logger.remove()
    logger.add(sys.stderr, level=level, format=FORMAT)
