"""Which tensors of a checkpoint are its MTP, and whether all of them are there.

Judged by names and config.json alone, so that nothing but an index has to be read.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from speculators.mtp.experts import expert_of
from speculators.mtp.parameters import parameters
from speculators.mtp.types import (
    BODY,
    NAMED_ONLY,
    TYPES,
    MtpType,
    Shape,
    find_dspark,
    language_config,
    model_types,
)

__all__ = [
    "EXPERTS",
    "Mtp",
    "blocks_of",
    "body_layers",
    "find_mtp",
    "nearest_layer",
    "promise",
    "why_unknown",
]

PROMISES = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""The keys of config.json that say how many MTP layers there are."""

EXPERTS = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
"""The keys that say how many experts a layer has."""

MOST_LAYERS, MOST_EXPERTS = 1_000, 10_000
"""No MTP has more: what is missing beyond these is not listed, whatever a config or a name says."""


@dataclass(frozen=True, slots=True)
class Mtp:
    """The MTP of a checkpoint.

    Attributes:
        type: its type.
        slots: stored name → the name with which tensors of two checkpoints are compared: the layer
            number counts from 0 and, where the layers follow the verifier's, nothing is before it.
        first: the stored number of the first MTP layer.
        layers: how many there are.
        prefix: what is before ``layers.`` in the names, where the layers follow the verifier's.
        key: the key of config.json that promises it.
        promised: how many layers that key says; ``None`` if it is not there, or says none.
        missing: the names of tensors that should be there.

    """

    type: MtpType
    slots: dict[str, str]
    first: int
    layers: int
    prefix: str
    key: str
    promised: int | None
    missing: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """The stored names of its tensors."""
        return set(self.slots)

    @property
    def state(self) -> str:
        """``complete``, ``incomplete``, or ``missing`` if it is only promised."""
        return "missing" if not self.slots else "incomplete" if self.missing else "complete"

    def name_of(self, slot: str) -> str:
        """The name under which a tensor is stored here; see ``slots``."""
        if not self.type.after_body:
            return slot
        _, layer, rest = slot.split(".", 2)
        return f"{self.prefix}layers.{self.first + int(layer)}.{rest}"

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """The names of the tensors that every MTP of its type has, and their shapes."""
        for name, shape in self.type.once.items():
            yield self.name_of(name), shape
        for layer in range(min(max(self.layers, self.promised or 0), MOST_LAYERS)):
            for name, shape in self.type.each.items():
                yield self.name_of(name.format(layer=layer)), shape


def find_mtp(config: Mapping[str, Any], names: Collection[str]) -> Mtp | None:
    """Find the MTP in a checkpoint.

    Args:
        config: its config.json.
        names: the names of all its tensors.

    Returns:
        the MTP, which is complete, incomplete, or promised and missing; ``None`` if there is none,
        or none of a known type: see ``why_unknown``.

    """
    if find_dspark(names) or model_types(config) & NAMED_ONLY.keys():
        return None
    kind = _type_of(config, names)
    if kind is None:
        return None
    layer_count = language_config(config).get("num_hidden_layers")
    body = layer_count if isinstance(layer_count, int) else None
    matches = {name: found for name in names if (found := kind.pattern.fullmatch(name))}
    if kind.after_body:
        marked = {int(it["layer"]) for name, it in matches.items() if kind.marks.fullmatch(name)}
        matches = {
            name: it
            for name, it in matches.items()
            if int(it["layer"]) in marked or (body is not None and int(it["layer"]) >= body)
        }
    key, promised = promise(config, kind)
    if not matches and promised is None:
        return None
    numbers = {int(it["layer"]) for it in matches.values() if it["layer"] is not None}
    first = min(numbers, default=body or 0) if kind.after_body else 0
    prefixes = {it["prefix"] for it in matches.values()} if kind.after_body else {""}
    if not matches:
        prefixes = {it["prefix"] for it in map(BODY.fullmatch, names) if it}
    mtp = Mtp(
        type=kind,
        slots={name: _slot(kind, first, name, it) for name, it in matches.items()},
        first=first,
        layers=max(numbers, default=first - 1) - first + 1,
        prefix=min(prefixes, default="model."),
        key=key,
        promised=promised,
    )
    if not matches:
        return mtp
    return replace(mtp, missing=tuple(dict.fromkeys(_missing(mtp, names, config))))


def why_unknown(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What a checkpoint has in the place of an MTP of a known type, and what to do with it.

    Returns:
        a clause that follows its name; ``None`` if nothing is known.

    """
    if dspark := find_dspark(names):
        return (
            f"has {dspark}, a stage of DSpark, not of an MTP; vLLM serves it out of the verifier's "
            "own directory with the method dspark and no model, SGLang with the algorithm DSPARK"
        )
    for kind in sorted(model_types(config) & NAMED_ONLY.keys()):
        return (
            f"is of the model type {kind}, and the tensors of the MTP of {NAMED_ONLY[kind]} are "
            "not known here; serve it out of the verifier's own directory"
        )
    return None


def _type_of(config: Mapping[str, Any], names: Collection[str]) -> MtpType | None:
    kinds = model_types(config)
    for known in TYPES:
        if kinds & known.model_types:
            return known
    shown = [known for known in TYPES if any(map(known.marks.fullmatch, names))]
    said = {key for key in PROMISES if _say(config, key) is not None}
    return next((it for it in shown if it.key in said), shown[0] if shown else None)


def _say(config: Mapping[str, Any], key: str) -> int | None:
    """A positive number that a config.json says, for the language model or at its top."""
    for part in (language_config(config), config):
        value = part.get(key)
        if type(value) is int and value > 0:
            return value
    return None


def promise(config: Mapping[str, Any], kind: MtpType) -> tuple[str, int | None]:
    """The key of a config.json that promises an MTP, and how many layers it says, if any."""
    for key in (kind.key, *PROMISES):
        if (layers := _say(config, key)) is not None:
            return key, layers
    return kind.key, None


def _slot(kind: MtpType, first: int, name: str, found: re.Match[str]) -> str:
    if not kind.after_body:
        return name
    rest = name.removeprefix(f"{found['prefix']}layers.{found['layer']}.")
    return f"layers.{int(found['layer']) - first}.{rest}"


def body_layers(mtp: Mtp, names: Collection[str]) -> dict[int, dict[str, str]]:
    """The verifier's decoder layers: number → name within the layer → stored name."""
    layers: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        if name not in mtp.slots and (found := BODY.fullmatch(name)):
            layers[int(found["layer"])][found["block"]] = name
    return layers


def blocks_of(mtp: Mtp) -> dict[int, dict[str, str]]:
    """Where MTP layers are like the verifier's: number from 0 → name within → stored name."""
    blocks: dict[int, dict[str, str]] = defaultdict(dict)
    if "block" in mtp.type.pattern.groupindex:
        for name in mtp.slots:
            found = mtp.type.pattern.fullmatch(name)
            if found and found["block"]:
                blocks[int(found["layer"]) - mtp.first][found["block"]] = name
    return blocks


def nearest_layer(
    block: Collection[str], layers: Mapping[int, Mapping[str, str]]
) -> Mapping[str, str]:
    """The decoder layer of the verifier that has most of a block's tensors; may be empty."""
    wanted = parameters(block)

    def nearness(layer: Mapping[str, str]) -> tuple[int, int]:
        has = parameters(layer)
        return len(has & wanted), -len(has - wanted)

    return max(layers.values(), key=nearness, default={})


def _missing(mtp: Mtp, names: Collection[str], config: Mapping[str, Any]) -> Iterator[str]:
    """The tensors that should be there and are not, by their names; some twice."""
    there = parameters(mtp.slots)
    yield from (name for name, _ in mtp.shapes() if name not in there)

    layers = body_layers(mtp, names)
    for _, block in sorted(blocks_of(mtp).items()):
        name, stored = next(iter(block.items()))
        lost = parameters(nearest_layer(block, layers)) - parameters(block)
        yield from (stored.removesuffix(name) + it for it in sorted(lost))

    # An MTP that is not like the verifier's layers may have fewer experts.
    said = map(language_config(config).get, EXPERTS if blocks_of(mtp) else ())
    yield from _missing_experts(mtp.slots, next((it for it in said if type(it) is int), 0))


def _missing_experts(names: Collection[str], count: int) -> Iterator[str]:
    """Matrices of single experts that are missing, where each has its own."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        expert = expert_of(name)
        if expert and expert.index is not None:
            for matrix in expert.matrices:
                found[expert.place, matrix].add(expert.index)
    for (place, matrix), indices in found.items():
        most = min(max(count, 1 + max(indices)), MOST_EXPERTS)
        for index in sorted(set(range(most)) - indices):
            yield f"{place}.{index}.{matrix}.weight"
