"""`speculators convert`: research checkpoints into the speculators format."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from loguru import logger

from speculators.cli.shared import CacheDir
from speculators.errors import OutputError

__all__ = ["app"]

app = typer.Typer(
    help="Convert a research checkpoint to the speculators format.", no_args_is_help=True
)


@app.callback()
def convert() -> None:
    """Convert a research checkpoint to the speculators format."""


@app.command()
def eagle(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="The draft: a directory, a file of weights in one, or a Hugging Face id.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="The directory to create.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE_MODEL",
            help="The verifier that the draft was trained for: a directory or a Hugging Face id.",
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Instead of INPUT, OUTPUT and BASE_MODEL: a YAML or JSON file with a list of "
            "conversions; those that are done already are skipped.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="With --manifest: how many conversions run at a time.")
    ] = 1,
    layernorms: Annotated[
        bool,
        typer.Option(
            "--layernorms",
            help="Fail unless the draft has extra layernorms; they are detected in any case.",
        ),
    ] = False,
    fusion_bias: Annotated[
        bool,
        typer.Option(
            "--fusion-bias", help="Fail unless the draft has fc.bias; it is detected in any case."
        ),
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate/--no-validate",
            help="Prove that the result has the draft's tensors and computes what they compute.",
        ),
    ] = True,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of INPUT on the Hub.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUTPUT if it is a converted checkpoint."),
    ] = False,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="Round all tensors to this type. By default each keeps its own."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Publish OUTPUT on the Hub, with a model card, once it is validated.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: keep the repository private.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="With --push-to-hub: a report of `speculators evaluate`, for the model card.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")
    ] = False,
) -> None:
    """Convert an EAGLE-1, EAGLE-2 or HASS draft.

    OUTPUT gets config.json, model.safetensors, and conversion.json, which
    records what they were made of. It appears complete and proven, or not at all.

    For example:

    speculators convert eagle ./draft ./converted ./verifier --dry-run

    speculators convert eagle yuhuili/EAGLE-LLaMA3.1-Instruct-8B ./converted
    meta-llama/Llama-3.1-8B-Instruct

    speculators convert eagle --manifest batch.yaml --jobs 2
    """
    if manifest is not None:
        _refuse_beside_manifest(
            {
                "INPUT": source,
                "OUTPUT": output,
                "BASE_MODEL": base_model,
                "--layernorms": layernorms,
                "--fusion-bias": fusion_bias,
                "--no-validate": not validate,
                "--revision": revision,
                "--overwrite": overwrite,
                "--dtype": dtype,
                "--push-to-hub": push_to_hub,
                "--private": private,
                "--report": report,
            }
        )
        from speculators.cli.batch import run_batch

        run_batch(manifest, jobs=jobs, cache_dir=cache_dir, dry_run=dry_run)
        return
    if source is None or output is None or base_model is None:
        raise typer.BadParameter(
            "give INPUT, OUTPUT and BASE_MODEL, all three of them, or --manifest alone."
        )
    if jobs > 1:
        raise typer.BadParameter("--jobs only works with --manifest.")
    if push_to_hub is None and (private or report):
        raise typer.BadParameter("--private and --report only work with --push-to-hub.")
    if push_to_hub is not None and not validate:
        raise typer.BadParameter("what is published has to be validated: leave --no-validate out.")

    from speculators.cli.progress import progress_bar
    from speculators.convert.eagle import EagleConverter

    converter = EagleConverter()
    if push_to_hub is not None:
        from speculators.publish.draft import check_publishing, publish_draft

        check_publishing(push_to_hub, report)
    if dry_run:
        from speculators.cli.plan_view import print_plan

        _warn_of_what_is_in_the_way(output, overwrite=overwrite)
        print_plan(
            converter.plan(
                source,
                base_model,
                fusion_bias=fusion_bias,
                layernorms=layernorms,
                cache_dir=cache_dir,
                revision=revision,
                dtype=dtype,
            )
        )
        return
    with progress_bar() as progress:
        converter.convert(
            source,
            output,
            base_model,
            fusion_bias=fusion_bias,
            layernorms=layernorms,
            validate=validate,
            cache_dir=cache_dir,
            revision=revision,
            overwrite=overwrite,
            dtype=dtype,
            progress=progress,
        )
    if push_to_hub is not None:
        publish_draft(output, push_to_hub, private=private, report=report)


def _warn_of_what_is_in_the_way(output: Path, *, overwrite: bool) -> None:
    """Warn on a dry run of what would otherwise be an error: the plan is useful all the same."""
    from speculators.checkpoint.output.staging import check_output

    try:
        check_output(output.expanduser(), overwrite=overwrite)
    except OutputError as error:
        logger.warning(f"Without --dry-run this would fail: {error}")


def _refuse_beside_manifest(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise typer.BadParameter(
                f"with --manifest, {name} belongs in the manifest, entry by entry."
            )
