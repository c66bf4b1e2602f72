"""`speculators convert`: research checkpoints into the speculators format."""

import inspect
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from loguru import logger
from typer.core import TyperGroup

from speculators.cli.shared import CacheDir, share
from speculators.errors import OutputError

if TYPE_CHECKING:
    from speculators.families.family import Family

__all__ = ["app"]

EXPLANATION = """\
Convert {noun}.

OUTPUT gets config.json, model.safetensors, and conversion.json, which
records what they were made of. It appears complete and proven, or not at all.

For example:

speculators convert {name} ./draft ./converted ./verifier --dry-run

speculators convert {name} {draft} ./converted
{verifier}

speculators convert {name} --manifest batch.yaml --jobs 2
"""


ANY = "auto"
"""The command that converts drafts of whatever family they are."""

ANY_EXAMPLE = ("ORG/DRAFT", "ORG/VERIFIER")


class FamilyCommands(TyperGroup):
    """A command for each family, and one for all, made from the registry when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The names of the families, and ``auto``."""
        from speculators.families.registry import families

        return [*(family.name for family in families()), ANY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command that converts drafts of a family; ``None`` if there is no such family."""
        from speculators.families.registry import family_named

        family = family_named(cmd_name)
        return None if family is None and cmd_name != ANY else command_of(family)


app = typer.Typer(
    cls=FamilyCommands,
    help="Convert a research checkpoint to the speculators format.",
    no_args_is_help=True,
)


@app.callback()
def convert() -> None:
    """Convert a research checkpoint to the speculators format."""


def command_of(family: "Family | None") -> Any:
    """The command for a family, or for all: ``convert_draft``, with flags and options added."""
    from speculators.families.registry import flags_of, options_of

    name = family.name if family else ANY
    command = partial(convert_draft, family.name if family else None)
    update_wrapper(command, convert_draft)
    parameters = list(inspect.signature(convert_draft, eval_str=True).parameters.values())[1:-1]
    place = next(i for i, it in enumerate(parameters) if it.name == "jobs") + 1
    parameters[place:place] = [
        *(
            _parameter(
                option.name,
                None,
                str | None if option.metavar else bool | None,
                typer.Option(
                    option.flag if option.metavar else f"{option.flag}/--no-{option.flag[2:]}",
                    metavar=option.metavar or None,
                    help=option.help,
                    show_default=False,
                ),
            )
            for option in options_of(family)
        ),
        *(
            _parameter(
                flag.feature,
                False,
                bool,
                typer.Option(f"--{flag.feature.replace('_', '-')}", help=flag.help),
            )
            for flag in sorted(flags_of(family), key=lambda flag: flag.feature, reverse=True)
        ),
    ]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [it.replace(kind=inspect.Parameter.KEYWORD_ONLY) for it in parameters]
    )
    draft, verifier = family.example if family else ANY_EXAMPLE
    noun = family.noun if family else "a draft of whatever family it is"
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    one.command(
        name, help=EXPLANATION.format(noun=noun, name=name, draft=draft, verifier=verifier)
    )(share(command))
    return typer.main.get_command(one)


def _parameter(name: str, default: Any, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, option],
    )


def convert_draft(
    family_name: str | None,
    *,
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
    **said: Any,
) -> None:
    """Convert a draft of a family, or of any; ``said`` are the family's flags and options."""
    from speculators.families.registry import family_named, flags_of

    family = family_named(family_name)
    flags = {flag.feature for flag in flags_of(family)}
    if manifest is not None:
        _refuse_beside_manifest(
            {
                "INPUT": source,
                "OUTPUT": output,
                "BASE_MODEL": base_model,
                # An option may be answered with no.
                **{
                    f"--{name.replace('_', '-')}": value if name in flags else value is not None
                    for name, value in said.items()
                },
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

        run_batch(manifest, family, jobs=jobs, cache_dir=cache_dir, dry_run=dry_run)
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
    from speculators.convert import conversion

    asked = [name for name in said if name in flags and said[name]]
    options = {name: value for name, value in said.items() if name not in flags}
    if push_to_hub is not None:
        from speculators.publish.draft import check_publishing, publish_draft

        check_publishing(push_to_hub, report)
    if dry_run:
        from speculators.cli.plan_view import print_plan

        _warn_of_what_is_in_the_way(output, overwrite=overwrite)
        print_plan(
            conversion.plan(
                family,
                source,
                base_model,
                asked=asked,
                options=options,
                cache_dir=cache_dir,
                revision=revision,
                dtype=dtype,
            )
        )
        return
    with progress_bar() as progress:
        conversion.convert(
            family,
            source,
            output,
            base_model,
            asked=asked,
            options=options,
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
    from speculators.checkpoint.paths import local_path

    try:
        check_output(local_path(output, OutputError), overwrite=overwrite)
    except OutputError as error:
        logger.warning(f"Without --dry-run this would fail: {error}")


def _refuse_beside_manifest(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise typer.BadParameter(
                f"with --manifest, {name} belongs in the manifest, entry by entry."
            )
