"""The options of the commands that decode prompts with a verifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from speculators.cli.shared import DType
from speculators.evaluate.defaults import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from speculators.evaluate.prompts import Prompt
    from speculators.evaluate.report import Settings

__all__ = [
    "Device",
    "Limit",
    "MaxNewTokens",
    "Prompts",
    "ProposalType",
    "RunDType",
    "Seed",
    "Temperature",
    "TopP",
    "VerifierName",
    "dtype_name",
    "read_selected",
    "settings_of",
]

RunDType = Annotated[
    Literal["auto", DType],
    typer.Option(
        metavar="TYPE",
        help="The type to run in: float16, bfloat16 or float32, for short fp16, bf16 "
        "or fp32; auto is the one that the verifier is stored in.",
    ),
]
VerifierName = Annotated[
    str | None,
    typer.Option(
        help="The verifier: a directory or a Hugging Face id. By default the one that the draft's "
        "config names.",
        show_default=False,
    ),
]
ProposalType = Annotated[
    Literal["greedy", "sampling", "static_tree", "dynamic_tree"] | None,
    typer.Option(
        metavar="METHOD",
        help="How to propose tokens: greedy, sampling, static_tree or dynamic_tree. By default as "
        "the draft's config says.",
        show_default=False,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Prompts, one per line, in MT-bench's style or with the key prompt or messages. "
        "By default the 80 that come with speculators.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Use only this many prompts, the first ones.", show_default=False),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="The longest output, in tokens.", show_default=str(MAX_NEW_TOKENS)),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="For sampling; 0 means greedy decoding.", show_default="0"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="For sampling: only from the most probable tokens that together reach this.",
        show_default="1",
    ),
]
Seed = Annotated[int | None, typer.Option(help="For sampling.", show_default="0")]
Device = Annotated[
    str | None,
    typer.Option(
        help="A torch device, such as cpu or cuda:1; auto spreads the verifier over all "
        "accelerators. By default one accelerator, if any.",
        show_default=False,
    ),
]


def dtype_name(dtype: str) -> str:
    """Torch's name of the dtype that an option says, or ``auto``."""
    from speculators.checkpoint.tensor import FLOATS, stored_float

    return dtype if dtype == "auto" else FLOATS[stored_float(dtype)].name


def read_selected(prompts: Path | None, limit: int | None) -> "list[Prompt]":
    """Read the prompts that were asked for.

    Raises:
        PromptsError: if the file has none, or cannot be read.

    """
    from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

    return read_prompts(prompts or OWN_PROMPTS)[:limit]


def settings_of(
    selected: "Sequence[Prompt]",
    prompts: Path | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> "Settings":
    """The settings that the options stand for."""
    from speculators.evaluate.report import Settings

    if top_p == 0:
        raise typer.BadParameter("--top-p must be over 0.")
    return Settings(
        prompts_file=None if prompts is None else str(prompts),
        prompts_total=len(selected),
        max_new_tokens=MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        temperature=temperature or 0.0,
        top_p=1.0 if top_p is None else top_p,
        seed=seed or 0,
    )
