"""Convert an EAGLE checkpoint: read, plan, write, validate, and only then move into place."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.output.staging import check_output, staged_directory
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import Checkpoint, read_checkpoint
from speculators.checkpoint.repository import LocalDirectory, open_repository
from speculators.checkpoint.tensor import PlannedTensor
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.convert.plan import ConversionPlan, plan_conversion
from speculators.convert.provenance import (
    changed_source_files,
    check_files,
    read_record,
    record_conversion,
)
from speculators.convert.replan import plan_of_itself, verifier_of
from speculators.errors import CheckpointError, ConversionError, OutputError, VerifierError
from speculators.format.config import parse_config
from speculators.format.conversion import CONVERSION_FILE
from speculators.format.tensors import DTYPES

__all__ = ["LAYERNORM_MAPPINGS", "EagleConverter"]

LAYERNORM_MAPPINGS = {
    "embed_layernorm.weight": "post_embedding_layernorm.weight",
    "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
}
"""Names in a research checkpoint → names in the format; every other tensor keeps its name."""


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

        A third file, conversion.json, records what they were made from.

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
            dtype=dtype,
        )
        with staged_directory(output, overwrite=overwrite) as staging:
            config = plan.config.model_dump_json(indent=2, exclude_none=True)
            (staging / "config.json").write_text(config + "\n", encoding="utf-8")
            write_safetensors_file(
                staging / "model.safetensors",
                {
                    name: PlannedTensor.copy_of(info, plan.rounded_to)
                    for name, info in plan.tensors.items()
                },
                progress=progress,
            )
            unchecked = None
            if validate:
                from speculators.convert.validation import validate_conversion

                unchecked = validate_conversion(
                    plan, staging, cache_dir=cache_dir, progress=progress
                )
            record = record_conversion(plan, staging, unchecked=unchecked, progress=progress)
            (staging / CONVERSION_FILE).write_text(
                record.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
        logger.success(f"Saved to: {output}")
        return output

    def validate(
        self,
        directory: str | Path,
        source: str | Path | None = None,
        *,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        progress: Progress = silent,
    ) -> None:
        """Check a converted checkpoint again, at any time; nothing is written.

        Its files must be those that its conversion.json records, and the model must load. On seeded
        random inputs, its output must be finite, causal, and equal to a plain evaluation of its
        tensors, and its logits must be those of the verifier's head. A warning names what cannot be
        checked because the verifier or conversion.json is missing.

        Args:
            directory: the converted checkpoint.
            source: what it was converted from, a directory or a Hugging Face id. The conversion
                is planned again, and everything that ``convert`` proves is proven again.
            cache_dir: where downloads are kept; the Hub client's default cache if not given.
            revision: a branch, tag or commit of ``source`` on the Hub.
            progress: reports the bytes compared and hashed.

        Raises:
            CheckpointError, HubError: the directory or the source cannot be read or fetched.
            ConversionError: the source is not such a checkpoint.
            VerifierError: the verifier is a draft, or does not fit the source.
            FormatError: the directory is not a converted checkpoint.
            ValidationError: it is not what was written, or does not hold or compute what its
                source does.

        """
        directory = Path(directory).expanduser()
        logger.info(f"Checking converted checkpoint: {directory}")
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; give a converted checkpoint.")
        written = read_checkpoint(LocalDirectory(directory))
        config = parse_config(written.config, written.name)
        record = read_record(directory)
        if record is None:
            logger.warning(f"{directory} has no {CONVERSION_FILE}: what was written is not known")
        else:
            check_files(record, directory, progress)
        verifier = verifier_of(config, cache_dir=cache_dir)

        from speculators.convert.validation import validate_conversion, validate_model

        if source is None:
            plan = plan_of_itself(written, config, verifier, LAYERNORM_MAPPINGS)
            validate_model(plan, directory, cache_dir=cache_dir)
        else:
            checkpoint = _read(source, revision, cache_dir)
            plan = _plan(checkpoint, verifier, dtype=record.dtype if record else None)
            validate_conversion(plan, directory, cache_dir=cache_dir, progress=progress)
            for name in changed_source_files(record, plan.source, progress) if record else ():
                logger.warning(
                    f"{name} of {source} is not the file that was converted, but gives the same"
                )
        logger.success(f"Valid: {directory}")

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
        checkpoint = _read(input_path, revision, cache_dir)
        plan = _plan(
            checkpoint,
            open_verifier(base_model, cache_dir=cache_dir),
            fusion_bias=fusion_bias,
            layernorms=layernorms,
            dtype=dtype,
        )
        _refuse_draft_as_its_own_verifier(input_path, base_model)
        return plan


def _read(source: str | Path, revision: str | None, cache_dir: str | Path | None) -> Checkpoint:
    checkpoint = read_checkpoint(
        open_repository(source, revision=revision, cache_dir=cache_dir, one_file=True)
    )
    logger.info(f"Loaded {len(checkpoint.tensors)} weights")
    return checkpoint


def _plan(
    checkpoint: Checkpoint, verifier: Verifier, *, dtype: str | None, **flags: bool
) -> ConversionPlan:
    plan = plan_conversion(
        checkpoint, verifier, LAYERNORM_MAPPINGS, rounded_to=_stored_dtype(dtype), **flags
    )
    _log(plan)
    return plan


def _stored_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    for stored, name in DTYPES.items():
        if name == dtype:
            return stored
    raise ConversionError(
        f"The dtype {dtype} is not known; choose one of {', '.join(DTYPES.values())}."
    )


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
    if _are_same(Path(input_path).expanduser(), output):
        raise OutputError(f"{output} is the input too; choose another output.")


def _refuse_draft_as_its_own_verifier(input_path: str | Path, base_model: str | Path) -> None:
    source, verifier = Path(input_path).expanduser(), Path(base_model).expanduser()
    if source == verifier or _are_same(source, verifier):
        raise VerifierError(
            f"{base_model} is given as the draft and as its verifier; give the language model that "
            "the draft was trained for as BASE_MODEL."
        )


def _are_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
