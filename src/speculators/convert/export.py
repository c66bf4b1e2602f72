"""Export: from the speculators format to the layouts that other software reads.

What each target can express is in the family's table.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.output.staging import Marker, check_output, staged_directory
from speculators.checkpoint.output.writer import copy_file, write_safetensors_file
from speculators.checkpoint.paths import local_path
from speculators.checkpoint.tensor import DTYPE_BITS, Constant, PlannedTensor
from speculators.convert.plan import EXPORTED_ZEROS
from speculators.errors import ConversionError, OutputError
from speculators.families.converted import Converted, open_converted
from speculators.families.family import with_prefix
from speculators.families.serving import judge, obstacle
from speculators.families.target import Target
from speculators.format.tensors import TensorSpec

__all__ = ["ExportPlan", "export", "plan_export"]

EXPORTED = Marker("an export that speculators wrote", "model.safetensors", "speculators_export")
"""Marked in the header of the weights, whose further keys no reader of exports looks at."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export will write.

    Attributes:
        config: the config.json to write.
        tensors: name → the tensor to write.
        remarks: sentences for the log.

    """

    config: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    remarks: list[str]


def export(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a converted draft in the layout of another reader.

    The tensors' bytes are copied unchanged. The directory appears complete or not at all.

    Args:
        source: a converted directory, or a Hugging Face id of one.
        output: the directory to create.
        to: the name of a target of the draft's family.
        revision: a branch, tag or commit of ``source`` on the Hub.
        cache_dir: where downloads are kept.
        overwrite: replace ``output`` if an export is there.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError, HubError: the source cannot be read or fetched.
        FormatError: it is not in the speculators format.
        ConversionError: it has a feature that the target cannot express.
        OutputError: the output exists or cannot be written.

    """
    directory = local_path(output, OutputError)
    check_output(directory, overwrite=overwrite, marker=EXPORTED)
    converted = open_converted(source, HubAccess(cache_dir), revision=revision)
    target = converted.family.targets.get(to)
    if target is None:
        raise ConversionError(
            f"{converted.checkpoint.name} is {converted.family.noun}, which can be exported to "
            f"{', '.join(converted.family.targets)}, not to {to}."
        )
    plan = plan_export(converted, target)
    for remark in plan.remarks:
        logger.warning(f"{converted.checkpoint.name}: {remark}")
    with staged_directory(directory, overwrite=overwrite, marker=EXPORTED) as staging:
        config = json.dumps(plan.config, indent=2, ensure_ascii=False)
        (staging / "config.json").write_text(config + "\n", encoding="utf-8")
        write_safetensors_file(
            staging / "model.safetensors", plan.tensors, metadata={EXPORTED.key: to}
        )
        for name, companion in converted.checkpoint.companions.items():
            copy_file(companion.file, companion.identity, staging / name)
    logger.success(f"Exported for {target.reader}: {directory}")
    return directory


def plan_export(converted: Converted, target: Target) -> ExportPlan:
    """Plan an export.

    Args:
        converted: the draft.
        target: the layout to export to.

    Raises:
        ConversionError: if the draft has a feature that the target cannot express.

    """
    family, config = converted.family, converted.config
    depth = converted.verifier_layers
    if why := obstacle(family, config, converted.features, target, depth):
        raise ConversionError(
            f"{converted.checkpoint.name} {why}, which {target.reader} cannot compute; "
            f"{judge(family, config, converted.features, depth)}."
        )
    prefixes = target.prefixes(config)

    def named(name: str) -> str:
        return with_prefix(family.names.in_research(name), prefixes)

    tensors = {
        named(name): PlannedTensor.copy_of(info)
        for name, info in converted.tensors.items()
        if name not in target.drops
    }
    zeros = {
        named(spec.name): _zeros(spec, converted)
        for spec in family.tensors
        if spec.feature in target.zeros - converted.features
    }
    remarks = [
        remark
        for feature, remark in target.remarks.items()
        if feature is None or feature in converted.features
    ]
    return ExportPlan(
        config=family.export_config(config, target)
        | ({EXPORTED_ZEROS: sorted(zeros)} if zeros else {}),
        tensors=tensors | zeros | dict(target.adds(config)),
        remarks=[*remarks, *filter(None, [target.advice(config)])],
    )


def _zeros(spec: TensorSpec, converted: Converted) -> PlannedTensor:
    """A tensor of zeros, in the dtype of the draft's widest weights."""
    dtype = max((info.dtype for info in converted.tensors.values()), key=DTYPE_BITS.__getitem__)
    shape = spec.shape(converted.config.sizes)
    planned = PlannedTensor(dtype, shape, ())
    return PlannedTensor(dtype, shape, (Constant("zeros", dtype, bytes(planned.nbytes)),))
