"""`speculators doctor`: whether the installation works."""

from typing import Annotated

import typer

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/cli.md describes it.")
    ] = False,
) -> None:
    """Check the installation: what is there, whether it fits, and what is missing.

    Looks at the versions of Python and of the packages, at vLLM and whether it
    finds the plugin, and at the Hub's endpoint, token and cache, without using
    the network. The status is 1 if something is broken.

    For example:

    speculators doctor
    """
    from speculators.cli.output import Listing, show
    from speculators.cli.printing import printed
    from speculators.inspection.installation import diagnose

    with printed(as_json) as printing:
        printing.result = diagnosis = diagnose()
        if not as_json:
            show(
                Listing(
                    ("", "", "found", "expected", "advice"),
                    (
                        (it.status, it.name, it.found or "-", it.expected or "", it.advice or "")
                        for it in diagnosis.checks
                    ),
                )
            )
    if not diagnosis.ok:
        raise typer.Exit(1)
