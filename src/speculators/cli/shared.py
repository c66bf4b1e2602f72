"""What all commands share: --quiet and --debug, the log, and how errors are reported.

Exit statuses: 0, done; 1, an error, reported in one sentence; 2, wrong usage; 130, interrupted by
Ctrl-C; 143 and 129, stopped by SIGTERM and SIGHUP.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from speculators.cli.command import Command
from speculators.cli.signals import StoppedError
from speculators.errors import sentence, visible

if TYPE_CHECKING:
    from loguru import Record

__all__ = [
    "CacheDir",
    "DType",
    "Revision",
    "first_paragraph",
    "is_quiet",
    "keep_blas_to_one_thread",
    "share",
    "share_options",
]

CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where to keep downloads, instead of the Hugging Face cache.",
        show_default=False,
    ),
]
"""The option of every command that may read from the Hub."""

Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of DIR on the Hub.", show_default=False)
]
"""The option of commands that read a draft, DIR."""

DType = Literal["float16", "bfloat16", "float32", "fp16", "bf16", "fp32"]
"""The type of an option for a dtype: torch's names, and short ones."""

FORMAT = "<green>{time:YYYY-MM-DD HH:mm:ss}</green> | <level>{level: <8}</level> | {message}"

QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What keeps the libraries quiet; they read it when they are imported."""

LEFT_TO_TYPER = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)
"""Raised when a command ends early, rejects its arguments, or finds its output pipe closed."""

_quiet = ContextVar("quiet", default=False)

SHARED_OPTIONS = tuple(
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
    for name, option in {
        "quiet": typer.Option(
            "--quiet", "-q", help="Log nothing but errors, and show no progress."
        ),
        "debug": typer.Option("--debug", help="Log every detail, and show tracebacks."),
    }.items()
)


def share_options(app: typer.Typer) -> None:
    """Add --quiet and --debug to every command of ``app`` and of its groups."""
    for info in app.registered_commands:
        if info.callback is not None:
            info.callback = share(info.callback)
            info.cls = Command
            # Otherwise typer shortens it where there is no room for a table.
            info.short_help = first_paragraph(info.callback.__doc__)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            share_options(group.typer_instance)


def keep_blas_to_one_thread() -> None:
    """Let numpy's BLAS start no threads in this process and those that it starts.

    They spin while torch is imported, and a proof computes in one thread.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def is_quiet() -> bool:
    """Whether the running command was given --quiet: then it shows no progress either."""
    return _quiet.get()


def share(command: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a command, with the shared options in its signature, where typer looks for them."""

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, debug: bool, **options: Any) -> None:
        if quiet and debug:
            raise typer.BadParameter("--quiet and --debug exclude each other.")
        from loguru import logger  # here, since help takes no log

        _start_log("ERROR" if quiet else "DEBUG" if debug else "INFO")
        _quiet.set(quiet)
        if quiet:
            os.environ |= QUIET_ENVIRONMENT
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            logger.error("Interrupted.")
            raise typer.Exit(130) from None
        except StoppedError as stopped:
            logger.error(stopped.message)
            raise typer.Exit(int(stopped.code or 0)) from None
        except LEFT_TO_TYPER:
            raise
        except Exception as error:
            if debug:
                raise
            logger.error(sentence(error))
            raise typer.Exit(1) from None

    signature = inspect.signature(command, eval_str=True)
    parameters = [*signature.parameters.values(), *SHARED_OPTIONS]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _make_visible(record: "Record") -> None:
    record["message"] = visible(record["message"])


def _start_log(level: str) -> None:
    from loguru import logger

    logger.remove()
    # loguru does not heed these by itself; with None, it depends on what the log goes to.
    wanted = {"NO_COLOR": False, "FORCE_COLOR": True}
    colorize = next((colour for name, colour in wanted.items() if os.environ.get(name)), None)
    # Values from files may have control characters, which could forge a line or drive a terminal.
    logger.configure(patcher=_make_visible)
    logger.add(sys.stderr, level=level, format=FORMAT, colorize=colorize)
