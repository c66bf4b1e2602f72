"""What `inspect` says of a language model's MTP."""

from collections.abc import Mapping
from typing import Any

from speculators.checkpoint.tensor import TensorInfo
from speculators.inspection.findings import MtpFinding
from speculators.mtp import find
from speculators.mtp.quantization import lacking_scales, modules_of, not_excluded, storage_of

__all__ = ["mtp_finding"]


def mtp_finding(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> MtpFinding | None:
    """Say whether an MTP is there and complete, whether it is promised, and how it is stored.

    Args:
        config: the checkpoint's config.json.
        tensors: its tensors, by their stored names.

    """
    mtp = find.find_mtp(config, tensors)
    if mtp is None:
        return None
    own = {name: tensors[name] for name in mtp.slots}
    modules = modules_of(own)
    missing = [*mtp.missing, *lacking_scales(own)]
    return MtpFinding(
        type=mtp.type.name,
        title=mtp.type.title,
        state="missing" if not own else "incomplete" if missing else "complete",
        layers=mtp.layers,
        key=mtp.key,
        promised=mtp.promised,
        tensors=len(own),
        bytes=sum(info.nbytes for info in own.values()),
        missing=missing,
        stored=storage_of(own),
        quantized=bool(modules.quantized),
        not_excluded=not_excluded(config, modules),
    )
