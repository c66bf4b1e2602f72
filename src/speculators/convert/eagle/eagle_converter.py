"""Converting an EAGLE checkpoint: read, plan, write, validate, and only then publish."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.reader import read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.staging import check_output, staged_directory
from speculators.checkpoint.verifier import open_verifier
from speculators.checkpoint.writer import write_safetensors_file
from speculators.convert.eagle.plan import ConversionPlan, plan_conversion
from speculators.errors import OutputError

__all__ = ["LAYERNORM_MAPPINGS", "EagleConverter"]

LAYERNORM_MAPPINGS = {
    "embed_layernorm.weight": "post_embedding_layernorm.weight",
    "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
}
"""Names in a research checkpoint → names in the format; every other tensor keeps its name."""


class EagleConverter:
    """Converts EAGLE-1, EAGLE-2 and HASS checkpoints to the speculators format.

    A converter keeps no state: one can convert many checkpoints.

    Example:
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
    ) -> Path:
        """Convert a checkpoint into a directory with config.json and model.safetensors.

        The directory appears when it is complete and, unless ``validate`` is off, proven: until
        then, and if anything fails, ``output_path`` is left as it was.

        Args:
            input_path: a directory, a file of weights beside a config.json, or a Hugging Face id.
            output_path: the directory to make.
            base_model: the verifier that the draft was trained for: a directory or a Hugging
                Face id. Its config is read; its weights only to validate.
            fusion_bias: say that the checkpoint has ``fc.bias``. It is found by itself; saying so
                makes it an error if it has not.
            layernorms: say that the checkpoint has the extra layernorms; likewise.
            validate: prove the result before it appears, see ``validate_conversion``.
            cache_dir: where downloads are kept; the Hub client's own place if not given.
            revision: a branch, tag or commit of ``input_path`` on the Hub.
            overwrite: replace ``output_path`` if a converted checkpoint is there.

        Returns:
            The path of the directory.

        Raises:
            CheckpointError: the source is missing, damaged, or not safe to read.
            ConversionError: it is not such a checkpoint, or contradicts the flags.
            VerifierError: the verifier cannot be read or does not fit.
            HubError: a file cannot be had from the Hub.
            OutputError: the output exists or cannot be written.
            ValidationError: the result does not hold or compute what the source does.

        """
        logger.info(f"Converting Eagle checkpoint: {input_path}")
        output = Path(output_path).expanduser()
        _refuse_same_directory(input_path, output)
        _refuse_to_replace_what_is_read({"input": input_path, "verifier": base_model}, output)
        check_output(output, overwrite=overwrite)
        plan = self.plan(
            input_path,
            base_model,
            fusion_bias=fusion_bias,
            layernorms=layernorms,
            cache_dir=cache_dir,
            revision=revision,
        )
        with staged_directory(output, overwrite=overwrite) as staging:
            config = plan.config.model_dump_json(indent=2, exclude_none=True)
            (staging / "config.json").write_text(config + "\n", encoding="utf-8")
            write_safetensors_file(staging / "model.safetensors", plan.tensors)
            if validate:
                from speculators.convert.eagle.validation import validate_conversion

                validate_conversion(plan, staging, cache_dir=cache_dir)
        logger.success(f"Saved to: {output}")
        return output

    def plan(
        self,
        input_path: str | Path,
        base_model: str | Path,
        *,
        fusion_bias: bool = False,
        layernorms: bool = False,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
    ) -> ConversionPlan:
        """Say what ``convert`` would do, without writing anything; see there for the arguments."""
        checkpoint = read_checkpoint(
            open_repository(input_path, revision=revision, cache_dir=cache_dir, one_file=True)
        )
        logger.info(f"Loaded {len(checkpoint.tensors)} weights")
        plan = plan_conversion(
            checkpoint,
            open_verifier(base_model, cache_dir=cache_dir),
            LAYERNORM_MAPPINGS,
            fusion_bias=fusion_bias,
            layernorms=layernorms,
        )
        _log(plan)
        return plan


def _log(plan: ConversionPlan) -> None:
    logger.debug(
        f"Detected: fusion_bias={plan.config.fusion_bias}, layernorms={plan.config.layernorms}, "
        f"layer={plan.config.transformer_layer_architecture}, dtype={plan.config.torch_dtype}"
    )
    for target, info in plan.tensors.items():
        if target != info.name:
            logger.debug(f"Remapped: {info.name} -> {target}")
    for name, why in plan.left_out.items():
        logger.debug(f"Left out: {name}: {why}")
    for key, why in plan.config_left_out.items():
        logger.debug(f"Left out of config.json: {key}: {why}")
    for sentence in plan.odd:
        logger.warning(f"{plan.source.name}: {sentence}")


def _refuse_to_replace_what_is_read(read: dict[str, str | Path], output: Path) -> None:
    for what, path in read.items():
        source = Path(path).expanduser()
        if source.exists() and output.is_dir() and output.resolve() in source.resolve().parents:
            raise OutputError(f"{output} holds the {what} {source}; choose another output.")


def _refuse_same_directory(input_path: str | Path, output: Path) -> None:
    source = Path(input_path).expanduser()
    if source.exists() and output.exists() and source.samefile(output):
        raise OutputError(f"{output} is the input too; choose another output.")
