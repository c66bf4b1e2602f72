"""``Eagle3Converter``: the conversion of EAGLE-3, EAGLE-3.1 and P-EAGLE checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from speculators.checkpoint.progress import Progress, silent
from speculators.convert import conversion
from speculators.convert.plan import ConversionPlan
from speculators.families.eagle3 import EAGLE3

__all__ = ["Eagle3Converter"]


class Eagle3Converter:
    """Converts EAGLE-3, EAGLE-3.1 and P-EAGLE checkpoints to the speculators format.

    A converter keeps no state, so one can convert many checkpoints.

    Examples:
        >>> from speculators.convert.eagle3 import Eagle3Converter
        >>> Eagle3Converter().convert(
        ...     "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        ...     "./converted",
        ...     "meta-llama/Llama-3.1-8B-Instruct",
        ... )  # doctest: +SKIP

    """

    def convert(
        self,
        input_path: str | Path,
        output_path: str | Path,
        base_model: str | Path,
        *,
        aux_layers: Sequence[int] | None = None,
        aux_numbering: Literal["input", "output"] | None = None,
        norm_output: Literal["feedback", "head-only"] | None = None,
        mask_token_id: int | None = None,
        validate: bool = True,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        overwrite: bool = False,
        dtype: str | None = None,
        progress: Progress = silent,
    ) -> Path:
        """Convert a checkpoint into a directory with config.json and model.safetensors.

        A third file, conversion.json, records what they were made from; README.md is a model card.

        The directory appears only when it is complete and, unless ``validate`` is off, validated.
        Until then, and if anything fails, ``output_path`` is left as it was.

        Args:
            input_path: a directory, a file of weights beside a config.json, or a Hugging Face id.
            output_path: the directory to create.
            base_model: the verifier that the draft was trained for: a directory or a Hugging
                Face id. Its config is read, and its weights only for validation.
            aux_layers: the verifier's layers whose incoming states the draft reads, in ascending
                order; needed only if neither the checkpoint nor its publisher's habit says it.
            aux_numbering: how layers are numbered, in ``aux_layers`` or in the checkpoint:
                ``"input"``, the state that enters layer n (the default of ``aux_layers``);
                ``"output"``, the one that leaves it.
            norm_output: what that key of the checkpoint's config means: ``"feedback"``, the output
                after the final norm is fed back; ``"head-only"``, the norm is only applied before
                the head.
            mask_token_id: P-EAGLE: the token that stands for those that are not drafted yet.
            validate: prove the result before it appears, see ``validate_conversion``.
            cache_dir: where downloads are kept; the Hub client's default cache if not given.
            revision: a branch, tag or commit of ``input_path`` on the Hub.
            overwrite: replace ``output_path`` if a converted checkpoint is there.
            dtype: round the weights to ``"float16"``, ``"bfloat16"`` or ``"float32"``; each keeps
                its own dtype if not given.
            progress: reports the bytes written, compared and hashed.

        Returns:
            The path of the directory.

        Raises:
            CheckpointError: the source is missing, damaged, or not safe to read.
            ConversionError: it is not such a checkpoint, leaves open what an argument has to say,
                or has values that ``dtype`` cannot hold.
            VerifierError: the verifier cannot be read or does not fit.
            HubError: a file cannot be fetched from the Hub.
            OutputError: the output exists or cannot be written.
            ValidationError: the result does not hold or compute what the source does.

        """
        return conversion.convert(
            input_path,
            output_path,
            base_model,
            family=EAGLE3,
            options=_options(aux_layers, aux_numbering, norm_output, mask_token_id),
            validate=validate,
            cache_dir=cache_dir,
            revision=revision,
            overwrite=overwrite,
            dtype=dtype,
            progress=progress,
        )

    validate = staticmethod(conversion.validate)

    def plan(
        self,
        input_path: str | Path,
        base_model: str | Path,
        *,
        aux_layers: Sequence[int] | None = None,
        aux_numbering: Literal["input", "output"] | None = None,
        norm_output: Literal["feedback", "head-only"] | None = None,
        mask_token_id: int | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        dtype: str | None = None,
    ) -> ConversionPlan:
        """Plan what ``convert`` would do, without writing anything; see there for the arguments."""
        return conversion.plan(
            input_path,
            base_model,
            family=EAGLE3,
            options=_options(aux_layers, aux_numbering, norm_output, mask_token_id),
            cache_dir=cache_dir,
            revision=revision,
            dtype=dtype,
        )


def _options(
    aux_layers: Sequence[int] | None,
    aux_numbering: str | None,
    norm_output: str | None,
    mask_token_id: int | None,
) -> dict[str, Any]:
    return {
        "aux_layers": aux_layers if aux_layers is None else list(aux_layers),
        "aux_numbering": aux_numbering,
        "norm_output": norm_output,
        "mask_token_id": mask_token_id,
    }
