"""Folders without a checkpoint that could be read: what they hold, and how to get weights from it.

Judged by the names of files alone, so it works for a directory and for a repository on the Hub.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

__all__ = ["deepspeed_weights", "describe_folder"]

WEIGHTS = re.compile(r"[^/]+\.(safetensors|bin|pt|pth|ckpt)")
NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states).*")
SHARD = re.compile(r"(.+)-\d+-of-\d+\.(safetensors|bin)")
DEEPSPEED = re.compile(r"(?:[^/]+/)?mp_rank_(\d+)_model_states\.pt")
CACHED = re.compile(r"(?:hub/)?models--([^/]+)/")


@dataclass(frozen=True, slots=True)
class Folder:
    """The names in a folder, and what the user called it.

    Attributes:
        name: a path or a Hub id.
        local: whether it is a path.
        names: the files in it and in its folders, with ``/`` between them; those that are folders
            end with it.

    """

    name: str
    local: bool
    names: Collection[str]

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """The names that match a whole pattern, in order."""
        return [match for it in sorted(self.names) if (match := re.fullmatch(pattern, it))]

    def first(self, pattern: str) -> str | None:
        """The first name that matches."""
        return next((match[0] for match in self.matching(pattern)), None)

    @property
    def weights(self) -> list[str]:
        """Files of weights at its top."""
        return [
            it for it in sorted(self.names) if WEIGHTS.fullmatch(it) and not NOT_WEIGHTS.match(it)
        ]


def describe_folder(name: str, names: Collection[str], *, local: bool) -> str | None:
    """Say what a folder without a config.json or without weights holds, and what to do.

    Args:
        name: what the user called it.
        names: see ``Folder``; those that cannot be shown are passed over.
        local: whether it is a path, and not a Hub id.

    Returns:
        A sentence without its full stop; ``None`` if nothing is known.

    """
    folder = Folder(name, local, {it for it in names if it.isprintable()})
    return next(filter(None, (kind(folder) for kind in KINDS)), None)


def deepspeed_weights(names: Collection[str], latest: str | None) -> str | None:
    """The file in which DeepSpeed's ZeRO stages 0 to 2 keep whole weights; ``None`` if none does.

    Args:
        names: see ``Folder``.
        latest: what the file ``latest`` says, the name of the newest of several folders.

    """
    found = [match for it in sorted(names) if (match := DEEPSPEED.fullmatch(it))]
    if latest is not None and len(found) > 1:
        found = [match for match in found if match[0].startswith(f"{latest}/")]
    return found[0][0] if len(found) == 1 else None


def _hub_cache(folder: Folder) -> str | None:
    found = [match[1].replace("--", "/") for match in folder.matching(CACHED.pattern)]
    if not found:
        return None
    inner = "" if folder.first(r"models--[^/]+/") else "/hub"
    return (
        f"it is a cache of the Hub's client: give the id of a repository, such as {found[0]}, with "
        f"--cache-dir {folder.name}{inner}"
    )


def _cached_repository(folder: Folder) -> str | None:
    snapshots = folder.matching(r"(snapshots/[0-9a-f]{40})/")
    if not snapshots:
        return None
    return (
        f"it is a repository in the cache of the Hub's client: give its id, or {folder.name}/"
        f"{snapshots[-1][1]}"
    )


def _distributed(folder: Folder) -> str | None:
    found = folder.matching(r"((?:[^/]+/)?)[^/]*\.distcp")
    if not found:
        return None
    where = f"{folder.name}/{found[0][1]}".rstrip("/")
    return (
        "it holds shards of a distributed checkpoint (DCP, as FSDP writes them): make one file of "
        f"them with `accelerate merge-weights {where} OUTPUT`, or with `python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {where} OUTPUT/pytorch_model.bin`"
        ", and put config.json beside it"
    )


def _deepspeed(folder: Folder) -> str | None:
    whole = folder.matching(DEEPSPEED.pattern)
    if whole and len({match[1] for match in whole}) == 1:
        return (
            f"it holds a DeepSpeed checkpoint, whose weights are in {whole[-1][0]}: put "
            "config.json beside that file, and give the file"
        )
    if whole or folder.first(r"(?:[^/]+/)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt"):
        return (
            "it holds a DeepSpeed checkpoint whose weights are spread over its ranks (ZeRO stage "
            f"3): make weights of it with `python {folder.name}/zero_to_fp32.py {folder.name} "
            "OUTPUT`, and put config.json beside them"
        )
    return None


def _rank_files(folder: Folder) -> str | None:
    shard = folder.first(r"(?:[^/]+/)?[^/]*(?:world_size_\d+_)?rank_?\d+[^/]*\.(bin|pt|pth)")
    if not shard or NOT_WEIGHTS.match(shard.rpartition("/")[2]):
        return None
    return (
        f"it holds shards by rank ({shard}), as FSDP writes them: let the trainer that saved them "
        "save a full state dict, or merge them (verl: `python -m verl.model_merger merge`)"
    )


def _adapter(folder: Folder) -> str | None:
    if not folder.first(r"adapter_(config\.json|model\.(safetensors|bin))"):
        return None
    return (
        "it holds a LoRA adapter, which is not a checkpoint by itself: merge it into the "
        "checkpoint that it was trained on (merge_and_unload of PEFT), save that, and give it"
    )


def _weights_that_are_a_folder(folder: Folder) -> str | None:
    found = folder.first(r"(pytorch_model\.bin|model\.safetensors)/")
    if not found:
        return None
    return (
        f"{found.rstrip('/')} is a directory there (zero_to_fp32.py makes one if it is given that "
        "name): move the files in it up, beside config.json"
    )


def _shards_without_index(folder: Folder) -> str | None:
    shards = [match for it in folder.weights if (match := SHARD.fullmatch(it))]
    if not shards:
        return None
    index = f"{shards[0][1]}.{shards[0][2]}.index.json"
    if index in folder.names:
        return None
    return (
        f"it has {len(shards)} shards ({shards[0][0]}, ...) and no index that says what is in "
        f"which: fetch {index} too"
    )


def _folder_within(folder: Folder) -> str | None:
    found = [match[1] for match in folder.matching(r"([^/]+)/config\.json")]
    if not found:
        return None
    these = f"its folder{'s' * (len(found) > 1)} {' and '.join(found[:3])}"
    if folder.local:
        return f"{these} may be: give {folder.name}/{found[0]}"
    return (
        f"{these} may be: get it with `hf download {folder.name} --include '{found[0]}/*' "
        f"--local-dir DIR`, and give DIR/{found[0]}"
    )


def _no_config(folder: Folder) -> str | None:
    if "config.json" in folder.names or not folder.weights:
        return None
    return (
        f"it has weights ({folder.weights[0]}): put the config that training was given (of EAGLE's "
        "trainer, eagle/train/*_config.json) beside them, as config.json"
    )


def _other_weights(folder: Folder) -> str | None:
    found = folder.first(r"[^/]+\.(gguf|onnx|h5|msgpack|ot)")
    if not found or folder.weights:
        return None
    return f"{found} is in a format that is not read: give the checkpoint that it was made of"


KINDS: tuple[Callable[[Folder], str | None], ...] = (
    _hub_cache,
    _cached_repository,
    _distributed,
    _deepspeed,
    _rank_files,
    _adapter,
    _weights_that_are_a_folder,
    _shards_without_index,
    _no_config,
    _folder_within,
    _other_weights,
)
"""What a folder may be: the first that returns a sentence is used."""
