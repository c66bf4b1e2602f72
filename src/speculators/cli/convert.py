"""`speculators convert`: research checkpoints into the speculators format."""

import inspect
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculators.cli.command import Command, Group
from speculators.cli.shared import CacheDir, DType, keep_blas_to_one_thread, share
from speculators.errors import OutputError, did_you_mean

if TYPE_CHECKING:
    from speculators.families.family import Family

__all__ = ["SHORT_HELP", "app"]

EXPLANATION = """\
Convert {noun}.

OUTPUT gets config.json, model.safetensors, conversion.json, which records
what they were made of, and a model card. It appears complete and proven, or
not at all.

For example:

speculators convert {name} ./draft ./converted ./verifier --dry-run

speculators convert {name} {draft} ./converted
{verifier}
"""

SHORT_HELP = "Convert a research checkpoint to the speculators format."

ANY = "auto"
"""The command that converts drafts of any family."""

ANY_EXAMPLE = ("ORG/DRAFT", "ORG/VERIFIER")


class FamilyCommand(Command):
    """A command whose arguments are required, unless a manifest takes their place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._require(True)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments."""
        self._require(not any(it.partition("=")[0] == "--manifest" for it in args))
        return super().parse_args(ctx, args)

    def _require(self, required: bool) -> None:
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                parameter.required = required


class FamilyCommands(Group):
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
    help=SHORT_HELP,
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
    noun = family.noun if family else "a draft of any family"
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    one.command(
        name,
        cls=FamilyCommand,
        help=EXPLANATION.format(noun=noun, name=name, draft=draft, verifier=verifier),
        short_help=f"Convert {noun}.",
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
            help="Instead of INPUT, OUTPUT and BASE_MODEL: what `speculators batch` takes.",
            hidden=True,
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="With --manifest: how many conversions run at a time.", hidden=True
        ),
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
        DType | None,
        typer.Option(
            metavar="TYPE",
            help="Round all tensors to float16, bfloat16 or float32, for short fp16, bf16 or "
            "fp32. By default each keeps its own type.",
        ),
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/cli.md describes it.")
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

        run_batch(
            manifest, family, jobs=jobs, cache_dir=cache_dir, dry_run=dry_run, as_json=as_json
        )
        return
    assert source is not None, "required"
    assert output is not None, "required"
    assert base_model is not None, "required"
    if jobs > 1:
        raise typer.BadParameter("--jobs only works with --manifest.")
    _check_publishing_options(push_to_hub, private=private, report=report, validate=validate)

    from speculators.cli.printing import printed
    from speculators.cli.results import ConvertResult
    from speculators.convert import conversion

    planned: dict[str, Any] = {
        "asked": [name for name in said if name in flags and said[name]],
        "options": _read_options(family, {k: v for k, v in said.items() if k not in flags}),
        "cache_dir": cache_dir,
        "revision": revision,
        "dtype": dtype,
    }
    result = ConvertResult(output=str(output))
    keep_blas_to_one_thread()
    with printed(as_json, result):
        if push_to_hub is not None:
            from speculators.publish.draft import check_publishing, publish_draft

            check_publishing(push_to_hub, report)
        if dry_run:
            _warn_of_what_is_in_the_way(output, overwrite=overwrite)
            plan = conversion.plan(source, base_model, family=family, **planned)
            result.tell_plan(plan)
            if not as_json:
                from speculators.cli.plan_view import print_plan

                print_plan(plan)
            return
        from speculators.cli.progress import progress_bar

        with progress_bar() as progress:
            conversion.convert(
                source,
                output,
                base_model,
                family=family,
                validate=validate,
                overwrite=overwrite,
                progress=progress,
                **planned,
            )
        if as_json:
            result.tell_output(output)
        if push_to_hub is not None:
            result.url = publish_draft(output, push_to_hub, private=private, report=report)


def _check_publishing_options(
    repo: str | None, *, private: bool, report: Path | None, validate: bool
) -> None:
    """Refuse options that only work with --push-to-hub, or not with it."""
    if repo is None and (private or report):
        raise typer.BadParameter("--private and --report only work with --push-to-hub.")
    if repo is not None and not validate:
        raise typer.BadParameter("what is published has to be validated: leave --no-validate out.")


def _read_options(family: "Family | None", said: dict[str, str | None]) -> dict[str, Any]:
    """The values of the options of a family, of which those that were not given are left out."""
    from speculators.families.registry import options_of

    values: dict[str, Any] = {}
    for option in options_of(family):
        text = said[option.name]
        if text is None:
            continue
        try:
            values[option.name] = option.read(text)
        except ValueError as error:
            choices = option.metavar.split("|")
            meant = did_you_mean(text, choices) if len(choices) > 1 else ""
            raise typer.BadParameter(f"{error}{meant}.", param_hint=option.flag) from error
    return values


def _warn_of_what_is_in_the_way(output: Path, *, overwrite: bool) -> None:
    """Warn on a dry run of what would otherwise be an error: the plan is useful all the same."""
    from loguru import logger

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
