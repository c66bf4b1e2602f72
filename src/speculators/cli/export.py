"""`speculators export`: converted drafts into the layouts of other software."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from speculators.cli.shared import CacheDir, Revision
from speculators.families.readers import READERS

__all__ = ["export"]

Reader = Enum("Reader", {name: name for name in READERS}, type=str)  # type: ignore[misc]


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A converted draft: a directory or a Hugging Face id."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to create.")],
    to: Annotated[
        Reader,
        typer.Option(
            metavar="READER",
            help=f"Who will read it: {'; '.join(f'{k}, {who}' for k, who in READERS.items())}.",
        ),
    ],
    cache_dir: CacheDir = None,
    revision: Revision = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is an export.")
    ] = False,
) -> None:
    """Write a converted draft in another layout, its tensors byte for byte.

    OUT gets config.json and model.safetensors. It appears complete, or not at
    all.

    For example:

    speculators export ./converted ./for-sglang --to sglang
    """
    from speculators.convert import export as exporting

    exporting.export(
        source, output, to.value, cache_dir=cache_dir, revision=revision, overwrite=overwrite
    )
