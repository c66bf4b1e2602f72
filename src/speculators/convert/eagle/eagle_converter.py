"""``EagleConverter``: the conversion of EAGLE-1, EAGLE-2 and HASS checkpoints."""

from pathlib import Path

from speculators.checkpoint.progress import Progress, silent
from speculators.convert import conversion
from speculators.convert.plan import ConversionPlan
from speculators.families.eagle import EAGLE, LAYERNORM_MAPPINGS

__all__ = ["LAYERNORM_MAPPINGS", "EagleConverter"]


class EagleConverter:
    """Converts EAGLE-1, EAGLE-2 and HASS checkpoints to the speculators format.

    A converter keeps no state, so one can convert many checkpoints.

    Examples:
        >>> from speculators.convert.eagle import EagleConverter
        >>> EagleConverter().convert(
        ...     "yuhuili/EAGLE-LLaMA3.1-Instruct-8B",
        ...     "./converted",
        ...     "meta-llama/Llama-3.1-8B-Instruct",
        ... )  # doctest: +SKIP

    """

    def convert(
        self,
        input_path: str | Path,
        output_path: str | Path,
        base_model: str | Path,
        fusion_bias: bool = False,
        layernorms: bool = False,
        validate: bool = True,
        cache_dir: str | Path | None = None,
        *,
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
            fusion_bias: fail unless the checkpoint has ``fc.bias``; it is detected in any case.
            layernorms: fail unless the checkpoint has the extra layernorms; likewise.
            validate: prove the result before it appears, see ``validate_conversion``.
            cache_dir: where downloads are kept; the Hub client's default cache if not given.
            revision: a branch, tag or commit of ``input_path`` on the Hub.
            overwrite: replace ``output_path`` if a converted checkpoint is there.
            dtype: round the tensors to ``"float16"``, ``"bfloat16"`` or ``"float32"``; each keeps
                its own dtype if not given.
            progress: reports the bytes written, compared and hashed.

        Returns:
            The path of the directory.

        Raises:
            CheckpointError: the source is missing, damaged, or not safe to read.
            ConversionError: it is not such a checkpoint, contradicts the flags, or has values
                that ``dtype`` cannot hold.
            VerifierError: the verifier cannot be read or does not fit.
            HubError: a file cannot be fetched from the Hub.
            OutputError: the output exists or cannot be written.
            ValidationError: the result does not hold or compute what the source does.

        """
        return conversion.convert(
            input_path,
            output_path,
            base_model,
            family=EAGLE,
            asked=_asked(fusion_bias=fusion_bias, layernorms=layernorms),
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
        fusion_bias: bool = False,
        layernorms: bool = False,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        dtype: str | None = None,
    ) -> ConversionPlan:
        """Plan what ``convert`` would do, without writing anything; see there for the arguments."""
        return conversion.plan(
            input_path,
            base_model,
            family=EAGLE,
            asked=_asked(fusion_bias=fusion_bias, layernorms=layernorms),
            cache_dir=cache_dir,
            revision=revision,
            dtype=dtype,
        )


def _asked(**flags: bool) -> list[str]:
    return [feature for feature, asked in flags.items() if asked]
