"""`speculators evaluate`: how well a draft drafts."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from speculators.cli.shared import CacheDir

__all__ = ["evaluate"]


def evaluate(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="The converted draft, or the MTP that was cut out of a verifier: a directory or a "
            "Hugging Face id.",
        ),
    ],
    verifier: Annotated[
        str | None,
        typer.Option(
            help="The verifier: a directory or a Hugging Face id. By default the one that the "
            "draft's config names.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Prompts, one per line, in MT-bench's style or with the key prompt or messages. "
            "By default the 80 that come with speculators.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use only this many prompts, the first ones.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest output, in tokens.")
    ] = 256,
    proposal: Annotated[
        Literal["greedy", "sampling", "static_tree", "dynamic_tree"] | None,
        typer.Option(
            help="How to propose tokens. By default as the draft's config says.", show_default=False
        ),
    ] = None,
    num_draft_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="K|A..B",
            help="How many tokens to draft per verification step; a range such as 1..8 measures "
            "each length and recommends one. By default as the draft's config says.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="For sampling; 0 means greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    acceptance_only: Annotated[
        bool,
        typer.Option(
            "--acceptance-only",
            help="Skip plain decoding: no speed-up is measured and no outputs are compared.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="The type that both models run in; auto is the one the verifier is stored in."
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="A torch device, such as cpu or cuda:1; auto spreads the verifier over all "
            "accelerators. By default one accelerator, if any.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of DIR on the Hub.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A directory to create, for report.json and plots.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --output: replace it if it is a report.")
    ] = False,
) -> None:
    """Measure acceptance and speed of a converted draft, and compare with plain decoding.

    Ctrl-C stops it; what was measured so far is still reported.

    For example:

    speculators evaluate ./converted --num-draft-tokens 1..8 --output report
    """
    lengths = _draft_lengths(num_draft_tokens)
    if overwrite and output is None:
        raise typer.BadParameter("--overwrite only works with --output.")

    from speculators.checkpoint.output.staging import check_output
    from speculators.cli.report_view import print_report, progress_bar
    from speculators.evaluate.files import REPORT, save_report
    from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
    from speculators.evaluate.report import Settings

    if output is not None:
        check_output(output, overwrite=overwrite, marker=REPORT)
    selected = read_prompts(prompts or OWN_PROMPTS)[:limit]
    settings = Settings(
        prompts_file=None if prompts is None else str(prompts),
        prompts_total=len(selected),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        acceptance_only=acceptance_only,
    )

    from speculators.evaluate.evaluation import Evaluation
    from speculators.evaluate.subject import load_subject

    subject = load_subject(
        directory,
        verifier=verifier,
        dtype=dtype,
        device=device,
        cache_dir=cache_dir,
        revision=revision,
    )
    proposals = [subject.draft.proposal_method(proposal, length) for length in lengths]
    evaluation = Evaluation(subject, selected, proposals, settings)
    try:
        with progress_bar(len(selected)) as advance:
            for result in evaluation.run():
                advance(result)
    finally:  # also when it was stopped, or failed: nothing measured is lost
        if evaluation.measured:
            report = evaluation.report()
            try:
                print_report(report)
            finally:  # even if nobody reads what is printed
                if output is not None:
                    save_report(report, output, overwrite=overwrite)


def _draft_lengths(text: str | None) -> list[int] | list[None]:
    """Parse ``4`` to [4] and ``1..8`` to [1, ..., 8]; [None] is the proposal method's default."""
    if text is None:
        return [None]
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise typer.BadParameter(
            f"{text!r} is neither a number of tokens, as 4, nor a range, as 1..8.",
            param_hint="--num-draft-tokens",
        )
    return list(range(first, last + 1))
