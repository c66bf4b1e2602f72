"""`speculators record`: texts of a verifier, on which drafts are scored."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.decoding import (
    Device,
    Limit,
    MaxNewTokens,
    Prompts,
    RunDType,
    Seed,
    Temperature,
    TopP,
    dtype_name,
    read_selected,
    settings_of,
)
from speculators.cli.shared import CacheDir
from speculators.errors import EvaluationError
from speculators.evaluate.defaults import BATCH, LONGEST_DRAFT

if TYPE_CHECKING:
    from speculators.evaluate.recording.manifest import Recording

__all__ = ["record"]


def record(
    base_model: Annotated[
        str,
        typer.Argument(
            metavar="BASE_MODEL", help="The verifier: a directory or a Hugging Face id."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The directory to create, for the recording.")
    ],
    prompts: Prompts = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="I,J,...",
            help="Also keep the inputs of these decoder layers, counted from 0, for drafts that "
            "read them, such as EAGLE-3's and DFlash's: 'evaluate --recording' says which. They "
            "can be added to a recording later.",
            show_default=False,
        ),
    ] = None,
    longest_draft: Annotated[
        int,
        typer.Option(
            min=1,
            help="The longest chains, or depth of the deepest trees, that can be scored.",
        ),
    ] = LONGEST_DRAFT,
    batch_size: Annotated[
        int, typer.Option(min=1, help="How many prompts are decoded at the same time.")
    ] = BATCH,
    dtype: RunDType = "auto",
    device: Device = None,
    cache_dir: CacheDir = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT if it is a recording.")
    ] = False,
) -> None:
    """Decode prompts once, to score any number of drafts on the texts.

    They are kept with the hidden states that drafts read. If OUTPUT was recorded
    with the same options, only layers that it lacks are added.

    For example:

    speculators record ./verifier ./recording --limit 16

    speculators evaluate ./draft --recording ./recording --num-draft-tokens 1..8
    """
    wanted = _layers(layers)

    from speculators.checkpoint.hub.access import HubAccess
    from speculators.checkpoint.output.staging import check_output
    from speculators.checkpoint.verifier import open_verifier
    from speculators.evaluate.recording.manifest import (
        RECORDING,
        RECORDING_FILE,
        identify,
        open_recording,
    )
    from speculators.evaluate.subject.opening import check_device

    check_device(device)
    selected = read_selected(prompts, limit)
    settings = settings_of(selected, prompts, max_new_tokens, temperature, top_p, seed)
    wanted_dtype = dtype_name(dtype)
    opened = open_verifier(base_model, HubAccess(cache_dir))
    if wanted and opened.layers is not None and max(wanted) > opened.layers:
        raise EvaluationError(
            f"{base_model} has {opened.layers} layers, so --layers takes 0 to {opened.layers}, the "
            f"state that leaves the last one, and not {max(wanted)}."
        )
    identity = identify(opened)
    existing: Recording | None = None
    if (output / RECORDING_FILE).is_file() and not overwrite:
        existing = open_recording(output)
        existing.check_verifier(identity, "this call")
        existing.check_settings(
            selected,
            limit=len(selected),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            longest_draft=longest_draft,
            dtype=None if wanted_dtype == "auto" else wanted_dtype,
        )
        wanted_dtype = existing.manifest.dtype
        if not wanted - {*existing.manifest.layers}:
            from loguru import logger

            logger.info(f"{output} has been recorded with these options already")
            return
    else:
        check_output(output, overwrite=overwrite, marker=RECORDING)

    from loguru import logger

    from speculators.cli.report_view import recording_bar
    from speculators.evaluate.recording.recorder import add_layers
    from speculators.evaluate.recording.recorder import record as record_texts
    from speculators.evaluate.subject.loading import load_verifier

    verifier = load_verifier(opened, base_model, dtype=wanted_dtype, device=device)
    with recording_bar(len(selected)) as (moved, done):
        if existing is not None:
            add_layers(
                existing, verifier, selected, sorted(wanted), batch_size=batch_size, moved=moved
            )
        else:
            record_texts(
                verifier,
                identity,
                selected,
                settings,
                output,
                layers=sorted(wanted),
                longest_draft=longest_draft,
                batch_size=batch_size,
                overwrite=overwrite,
                moved=moved,
                done=done,
            )
    logger.success(f"Saved to: {output}")


def _layers(text: str | None) -> set[int]:
    """Parse ``2,15,28``."""
    if text is None:
        return set()
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise typer.BadParameter(
            f"{text!r} is not a list of layers, such as 2,15,28.", param_hint="--layers"
        )
    return {int(part) for part in text.split(",")}
