"""Cut an MTP out of its verifier's checkpoint, into a directory of its own."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from loguru import logger

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.headers import headers_only
from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.output.links import copy
from speculators.checkpoint.output.staging import check_output, staged_directory
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.checkpoint.paths import local_path
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import read_config, read_names, read_tensors
from speculators.checkpoint.repository import LocalDirectory, Repository, open_repository
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.errors import CheckpointError, OutputError, listed
from speculators.mtp.config import promising, write_json
from speculators.mtp.find import Mtp, find_mtp, why_unknown
from speculators.mtp.journal import half_done
from speculators.mtp.llamacpp import TOKENIZER_FILES, taken_along
from speculators.mtp.quantization import (
    MODELOPT_FILE,
    lacking_scales,
    modules_of,
    with_exclusions,
)

__all__ = ["check_mtp", "check_outside", "cut", "read_mtp", "tensors_of"]


def cut(
    verifier: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    to: Literal["llamacpp"] | None = None,
    progress: Progress = silent,
) -> Path:
    """Copy the MTP of a verifier into a directory that engines load as a draft.

    The directory gets the MTP's tensors under their own names, their bytes unchanged, in
    model.safetensors, and config.json, which says how many layers the MTP has and which of its
    modules are not quantized. From the Hub, only an index or a header, config.json and the MTP's
    bytes are fetched. The directory appears complete or not at all.

    Args:
        verifier: a directory, a file of weights in one, or a Hugging Face id.
        output: the directory to create; it must not exist.
        revision: a branch, tag or commit of the verifier on the Hub.
        cache_dir: where downloads are kept.
        to: ``"llamacpp"`` for what llama.cpp's converter takes with its ``--mtp``: the verifier's
            embedding, final norm, head and tokenizer, too.
        progress: reports the bytes written.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError, HubError: the verifier cannot be read or fetched, or has no complete MTP
            of a known type.
        ConversionError: llama.cpp does not take it.
        OutputError: the output exists or cannot be written.

    """
    directory = local_path(output, OutputError)
    check_output(directory, overwrite=False, marker=None)
    repository = open_repository(verifier, HubAccess(cache_dir), revision=revision, one_file=True)
    if isinstance(repository, LocalDirectory):
        check_outside(directory, repository.path, "the verifier")
    config, _ = read_config(repository)
    if config.get("speculators_model_type") == "mtp":
        raise CheckpointError(
            f"{repository.name} is an MTP as speculators 0.9 writes it, under names that no engine "
            "reads; graft it into its verifier, and cut it out of that."
        )
    with headers_only(repository) as light:
        names = read_names(light)
    mtp = check_mtp(find_mtp(config, names), repository, config, names)
    beside = frozenset[str]()
    files = {MODELOPT_FILE: repository.file(MODELOPT_FILE)}
    if to == "llamacpp":
        beside = taken_along(repository.name, config, mtp, names)
        files |= {it: repository.file(it) for it in TOKENIZER_FILES}
    with staged_directory(directory, marker=None) as staging:
        tensors = tensors_of(mtp, repository, beside)
        modules = modules_of({name: info for name, info in tensors.items() if name in mtp.slots})
        write_json(staging / "config.json", promising(with_exclusions(config, modules), mtp))
        for name, file in files.items():
            if file is not None and name == MODELOPT_FILE:
                write_json(staging / name, with_exclusions(read_json(file), modules))
            elif file is not None:
                copy(file, staging / name)
        planned = {name: PlannedTensor.copy_of(info) for name, info in tensors.items()}
        write_safetensors_file(staging / "model.safetensors", planned, progress=progress)
    size = sum(info.nbytes for info in tensors.values())
    what = f"{len(mtp.slots)} tensors{f' and {len(beside)} of the verifier' if beside else ''}"
    logger.success(
        f"Cut {mtp.type.title} ({what}, {size} bytes) out of {repository.name}: {directory}"
    )
    return directory


def check_outside(output: Path, source: Path, what: str) -> None:
    """Check that an output is not a part of what is read.

    Args:
        output: the directory to create.
        source: a directory that is read.
        what: what that is, for the message.

    Raises:
        OutputError: if it is.

    """
    if source.resolve() in output.resolve().parents:
        raise OutputError(f"{output} is within {what} {source}; choose another output.")


def read_mtp(repository: Repository, config: Mapping[str, Any]) -> Mtp:
    """Find the MTP of a checkpoint; only names are read. Raises as ``check_mtp``."""
    with headers_only(repository) as light:
        names = read_names(light)
    return check_mtp(find_mtp(config, names), repository, config, names)


def check_mtp(
    mtp: Mtp | None, repository: Repository, config: Mapping[str, Any], names: Collection[str]
) -> Mtp:
    """Check that an MTP was found, and that all of it is there.

    Raises:
        CheckpointError: if there is none of a known type, tensors of it are missing, or a graft in
            place was stopped before the verifier was whole again.

    """
    if isinstance(repository, LocalDirectory) and (why := half_done(repository.path)):
        raise CheckpointError(f"{repository.name} {why}.")
    if mtp is None:
        why = why_unknown(config, names) or (
            "has no MTP: no tensor is named like one of an MTP, and config.json does not promise "
            "one"
        )
        raise CheckpointError(f"{repository.name} {why}.")
    if mtp.state == "missing":
        raise CheckpointError(
            f"{repository.name} has lost its MTP: config.json promises {mtp.promised} layer(s) "
            f"({mtp.key}), but no tensor is named like one of "
            f"{mtp.type.title}{_elsewhere(repository)}."
        )
    if mtp.missing:
        raise CheckpointError(
            f"{repository.name} has only a part of its MTP: it lacks {listed(mtp.missing)}; "
            "give a complete checkpoint."
        )
    return mtp


def tensors_of(
    mtp: Mtp, repository: Repository, beside: frozenset[str] = frozenset()
) -> dict[str, TensorInfo]:
    """The tensors of an MTP, in the checkpoint's order; from the Hub, their bytes are fetched.

    Args:
        mtp: the MTP.
        repository: the checkpoint that has it.
        beside: the names of others to read, too.

    Raises:
        CheckpointError: if they cannot be read, or FP8 matrices have no scales.
        HubError: if they cannot be fetched.

    """
    wanted = mtp.names | beside
    read = read_tensors(repository, only=wanted)
    tensors = {name: info for name, info in read.items() if name in wanted}
    if lacking := lacking_scales(tensors):
        raise CheckpointError(
            f"{repository.name} has FP8 matrices without their scales in its MTP: it lacks "
            f"{listed(lacking)}; fetch the complete checkpoint."
        )
    return tensors


def _elsewhere(repository: Repository) -> str:
    """What to do about weights that lie elsewhere: in other files, or beside an index."""
    if (repository.weights or "").endswith(".safetensors"):
        return "; other files of its directory may hold them: give the directory"
    others = [it for it in repository.names() if it.endswith(".safetensors") and "mtp" in it]
    if not others:
        return "; take it from a checkpoint that has it"
    return f"; its index names no such tensor, but {others[0]} may hold them: give that file"
