"""`speculators mtp`: drafts that live inside a language model's own checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from speculators.cli.shared import CacheDir

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Cut the MTP (multi-token prediction) out of a verifier, or put one back.",
)


@app.command()
def cut(
    verifier: Annotated[
        str,
        typer.Argument(
            metavar="VERIFIER",
            help="The language model: a directory, a file of weights in one, or a Hugging Face id.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to create.")],
    to: Annotated[
        Literal["llamacpp"] | None,
        typer.Option(
            help="Who will read it: for llamacpp, OUT also gets the verifier's embedding, norm, "
            "head and tokenizer, which llama.cpp's convert_hf_to_gguf.py --mtp needs.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of VERIFIER on the Hub.", show_default=False),
    ] = None,
) -> None:
    """Copy the MTP of a verifier into a directory of its own, byte for byte.

    OUT gets config.json and model.safetensors: vLLM and SGLang take it as the
    draft of the verifier. From the Hub, only headers and the MTP's own bytes
    are fetched. OUT appears complete, or not at all.

    For example:

    speculators mtp cut Qwen/Qwen3-Next-80B-A3B-Instruct ./mtp
    """
    from speculators.cli.progress import progress_bar
    from speculators.mtp import cut as cutting

    with progress_bar() as progress:
        cutting.cut(
            verifier, output, revision=revision, cache_dir=cache_dir, to=to, progress=progress
        )


@app.command()
def graft(
    verifier: Annotated[
        str, typer.Argument(metavar="VERIFIER", help="The directory of the language model.")
    ],
    mtp: Annotated[
        str,
        typer.Argument(
            metavar="MTP",
            help="What holds the MTP: a directory that `cut` made, another checkpoint of the "
            "verifier, or a Hugging Face id of one.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The directory to create.", show_default=False),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change VERIFIER itself, instead of creating OUT.")
    ] = False,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of MTP on the Hub.", show_default=False),
    ] = None,
) -> None:
    """Put an MTP that was lost, or trained again, into its verifier.

    The MTP becomes one new shard, its bytes unchanged, and the index names it.
    The shards of VERIFIER are linked into OUT; only those that hold an earlier
    MTP are written again, without it. The result appears complete, or not at
    all; VERIFIER changed with --in-place loads at any moment.

    For example:

    speculators mtp graft ./quantized ./mtp ./quantized-with-mtp
    """
    from speculators.cli.progress import progress_bar
    from speculators.mtp import graft as grafting

    if (output is None) != in_place:
        raise typer.BadParameter(
            "Give OUT, the directory to create, or --in-place: exactly one of the two."
        )
    with progress_bar() as progress:
        grafting.graft(
            verifier,
            mtp,
            output,
            in_place=in_place,
            revision=revision,
            cache_dir=cache_dir,
            progress=progress,
        )
