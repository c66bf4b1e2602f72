"""Put an MTP into the checkpoint of its verifier: what fits, and what has to be written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.output.staging import check_output
from speculators.checkpoint.paths import local_path
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import read_config, read_tensors
from speculators.checkpoint.repository import LocalDirectory, Repository, open_repository
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo, describe_shape
from speculators.errors import CheckpointError, ConversionError, OutputError, listed
from speculators.mtp.config import promising
from speculators.mtp.cut import check_mtp, check_outside, read_mtp, tensors_of
from speculators.mtp.experts import layout_of, restacked
from speculators.mtp.find import EXPERTS, Mtp, blocks_of, body_layers, find_mtp, nearest_layer
from speculators.mtp.journal import INDEX, clear_up, half_done
from speculators.mtp.parameters import module_of
from speculators.mtp.quantization import (
    MODELOPT_FILE,
    SHAPED,
    WHOLE,
    check_same_method,
    modules_of,
    with_exclusions,
)
from speculators.mtp.receiver import (
    SINGLE,
    WEIGHTS,
    Plan,
    Receiver,
    write_copy,
    write_in_place,
)
from speculators.mtp.types import BODY, language_config, model_types
from speculators.mtp.upstream import read_upstream

__all__ = ["graft"]

SIZES = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    *EXPERTS,
)
"""Keys of config.json that have to be the same for an MTP and its verifier."""


def graft(
    verifier: str | Path,
    mtp: str | Path,
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Put an MTP into a verifier: one that it has lost, or one that was trained again.

    The MTP's bytes are unchanged. Its experts are laid out as the verifier's: a tensor for each
    matrix, or stacks of all. config.json gets what promises the MTP, and the list of modules that
    are not quantized what is not quantized of it.

    Args:
        verifier: the directory of a checkpoint in safetensors files.
        mtp: what holds the MTP: a directory that ``cut`` made, any checkpoint of such a verifier,
            an MTP that speculators 0.9 trained, or a Hugging Face id of one.
        output: the directory to create; it must not exist. The verifier's shards are linked into
            it, or copied if it is on another file system.
        in_place: change the verifier's own directory instead.
        revision: a branch, tag or commit of ``mtp`` on the Hub.
        cache_dir: where downloads are kept.
        progress: reports the bytes written.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError, HubError: one of the two cannot be read or fetched, or the MTP is
            incomplete or has numbers that are not finite.
        ConversionError: the MTP does not fit the verifier.
        OutputError: the output exists, or cannot be written.

    """
    directory = _open_directory(verifier)
    if (output is None) != in_place:
        raise OutputError("Give either a directory to create or in_place, not both.")
    place = directory if output is None else local_path(output, OutputError)
    if output is None:
        _refuse_links(directory)
        clear_up(directory)
    else:
        _check_place(place, directory)
    receiver = _read_receiver(directory)
    repository = open_repository(mtp, HubAccess(cache_dir), revision=revision, one_file=True)
    if output is not None and isinstance(repository, LocalDirectory):
        check_outside(place, repository.path, "the MTP")
    plan = _plan(receiver, repository)
    if output is None:
        write_in_place(receiver, plan, progress)
    else:
        write_copy(receiver, plan, place, progress)
    logger.success(f"Grafted {len(plan.shard)} tensors of {mtp}: {place}")
    return place


def _open_directory(verifier: str | Path) -> Path:
    directory = local_path(verifier)
    if not directory.is_dir():
        raise CheckpointError(
            f"{verifier} is not a directory on this machine; give the verifier's, which `hf "
            "download ID --local-dir DIR` fetches from the Hub."
        )
    return directory


def _refuse_links(directory: Path) -> None:
    """Refuse to change a directory whose files are elsewhere, as those of a Hub cache are."""
    files = [it for it in directory.iterdir() if it.suffix == ".json" or it.suffix in WEIGHTS]
    if link := next((it for it in sorted(files) if it.is_symlink()), None):
        what = (
            "a snapshot in a cache of the Hub's client"
            if link.resolve().parent.name == "blobs"
            else "made of links"
        )
        raise OutputError(
            f"{directory} is {what} ({link.name} is a link to {link.resolve()}), so it is not "
            "changed in place; give a directory to create as OUT."
        )


def _check_place(place: Path, directory: Path) -> None:
    if place.exists() and place.samefile(directory):
        raise OutputError(
            f"{place} is the verifier itself; change it with --in-place, or choose another output."
        )
    check_outside(place, directory, "the verifier")
    check_output(place, overwrite=False, marker=None)


def _read_receiver(directory: Path) -> Receiver:
    if why := half_done(directory):
        raise CheckpointError(f"{directory} {why}.")
    repository = LocalDirectory(directory)
    config, config_file = read_config(repository)
    tensors = read_tensors(repository)
    if other := next((it for it in tensors.values() if it.file.suffix != ".safetensors"), None):
        raise ConversionError(
            f"{directory} has its weights in {other.file.name}, and an MTP is grafted into "
            "safetensors files; save the verifier as such (with save_pretrained of transformers)."
        )
    if "speculators_model_type" in config:
        raise ConversionError(f"{config_file} is a draft's; give the verifier that gets the MTP.")
    single = {it.file.name for it in tensors.values()} == {SINGLE}
    index = {} if single else read_json(directory / INDEX)
    return Receiver(directory, config, tensors, index)


def _plan(receiver: Receiver, repository: Repository) -> Plan:
    if isinstance(repository, LocalDirectory) and repository.path.samefile(receiver.directory):
        raise ConversionError(
            f"{repository.name} is given as the verifier and as the MTP; give what holds the MTP "
            "to graft."
        )
    config, _ = read_config(repository)
    names = (repository.name, str(receiver.directory))
    tensors: dict[str, TensorInfo] | None = None
    if config.get("speculators_model_type") == "mtp":
        config, tensors = read_upstream(repository, config)
        source = check_mtp(find_mtp(config, tensors), repository, config, tensors)
    else:
        source = read_mtp(repository, config)
    _check_sizes(config, receiver.config, names)
    before = _find_place(receiver, source, names)
    if tensors is None:  # only now, since they may be on the Hub
        tensors = tensors_of(source, repository)

    others = receiver.tensors.keys() - before.names
    layout = layout_of(before.slots) or layout_of([it for it in others if BODY.fullmatch(it)])
    renamed = {before.name_of(source.slots[name]): info for name, info in tensors.items()}
    shard = restacked(renamed, layout)

    modules = modules_of(shard)
    check_same_method(config, receiver.config, names, modules)
    beside = set(filter(None, map(module_of, others)))
    changed = promising(with_exclusions(receiver.config, modules, beside), source)
    texts = {"config.json": changed} if changed != receiver.config else {}
    if (receiver.directory / MODELOPT_FILE).is_file():
        said = read_json(receiver.directory / MODELOPT_FILE)
        texts[MODELOPT_FILE] = with_exclusions(said, modules, beside)

    after = find_mtp(changed, {*others, *shard})
    if after is None or after.missing:
        lost = listed(after.missing) if after else "every one of them"
        raise ConversionError(
            f"{names[0]} lacks tensors that the MTP of {names[1]} needs: {lost}; give a complete "
            "MTP of this verifier."
        )
    _check_shapes(receiver, before, after, shard, names)
    _tell_of_other_dtypes(shard, [receiver.tensors[it] for it in others])
    return Plan(shard, before.names, texts)


def _check_sizes(
    source: Mapping[str, Any], target: Mapping[str, Any], names: tuple[str, str]
) -> None:
    """Check that the two config.json are those of one architecture, and of the same sizes."""
    theirs, ours = model_types(source), model_types(target)
    if not theirs & ours:
        raise ConversionError(
            f"{names[0]} is for verifiers of the model type {' or '.join(sorted(theirs)) or '?'}, "
            f"and {names[1]} is of the type {' or '.join(sorted(ours)) or '?'}; give an MTP of "
            "this verifier's architecture."
        )
    for key in SIZES:
        one, other = language_config(source).get(key), language_config(target).get(key)
        if one is not None and other is not None and one != other:
            raise ConversionError(
                f"{names[0]} is for verifiers with {key} {one}, and {names[1]} has {other}; give "
                "an MTP of this verifier."
            )


def _find_place(receiver: Receiver, source: Mtp, names: tuple[str, str]) -> Mtp:
    """The MTP that a verifier has, or the one that it will have, without its tensors.

    Raises:
        ConversionError: if it is of another type, or has more layers than the one to graft.

    """
    found = find_mtp(promising(receiver.config, source), receiver.tensors.keys())
    if found is None or found.type != source.type:
        there = found.type.title if found else "none of a known type"
        raise ConversionError(
            f"{names[0]} has {source.type.title}, but {names[1]} takes {there}; give "
            "an MTP of this verifier's architecture."
        )
    layers = max(found.layers, found.promised or 0)
    if layers > source.layers:
        raise ConversionError(
            f"{names[0]} has an MTP of {source.layers} layer(s), and that of {names[1]} has "
            f"{layers} ({found.key}); give all of them."
        )
    return found


def _check_shapes(
    receiver: Receiver,
    before: Mtp,
    after: Mtp,
    shard: Mapping[str, PlannedTensor],
    names: tuple[str, str],
) -> None:
    """Check the shapes against an earlier MTP's, the verifier's layers, and the hidden size."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    layers = body_layers(after, receiver.tensors.keys() - before.names)
    for block in blocks_of(after).values():
        nearest = nearest_layer(block, layers)
        for name in block.keys() & nearest.keys():
            like = receiver.tensors[nearest[name]]
            if like.dtype in SHAPED:
                expected[block[name]] = like.shape, f"as {like.name}"
    for name in before.names & shard.keys():
        if receiver.tensors[name].dtype in SHAPED:
            expected[name] = receiver.tensors[name].shape, "as before"
    hidden = language_config(receiver.config).get("hidden_size")
    if isinstance(hidden, int):
        for name, sizes in after.shapes():
            expected[name] = tuple(size * hidden for size in sizes), f"by hidden_size {hidden}"
    for name, (shape, why) in expected.items():
        if name in shard and shard[name].dtype in SHAPED and shard[name].shape != shape:
            raise ConversionError(
                f"{names[0]} has {name} of shape {describe_shape(shard[name].shape)}, and in "
                f"{names[1]} it has to be {describe_shape(shape)}, {why}; give an MTP of this "
                "verifier."
            )


def _tell_of_other_dtypes(shard: Mapping[str, PlannedTensor], others: list[TensorInfo]) -> None:
    ours = {it.dtype for it in others if it.dtype in WHOLE}
    odd = {it.dtype for it in shard.values() if it.dtype in WHOLE and len(it.shape) > 1} - ours
    if ours and odd:
        logger.warning(
            f"The MTP has matrices in {' and '.join(sorted(odd))}, the verifier in "
            f"{' and '.join(sorted(ours))}: they stay as they are, and engines round them as "
            "they load them"
        )
