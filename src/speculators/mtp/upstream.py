"""MTPs as speculators 0.9 trains and converts them: under names that no engine reads.

The names are those of its ``convert/mtp/converter.py`` and ``models/mtp/model_definitions.py``.
"""

from collections.abc import Mapping
from typing import Any

from loguru import logger

from speculators.checkpoint.reader import read_tensors
from speculators.checkpoint.repository import Repository
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import CheckpointError

__all__ = ["read_upstream"]

NAMES = {
    "mtp_layers.0.input_proj.": "mtp.fc.",
    "mtp_layers.0.final_layernorm.": "mtp.norm.",
    "mtp_layers.0.hidden_layernorm.": "mtp.pre_fc_norm_hidden.",
    "mtp_layers.0.token_layernorm.": "mtp.pre_fc_norm_embedding.",
    "mtp_layers.0.": "mtp.layers.0.",
}
"""How a name there begins → how it does in the verifier; the first that fits."""

OF_THE_VERIFIER = frozenset({"verifier_lm_head.weight", "lm_head.weight", "embed_tokens.weight"})
"""What is no part of the MTP: the head that is saved there is all NaN."""


def read_upstream(
    repository: Repository, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Read such a checkpoint as a verifier would hold it.

    Returns:
        the config of its verifier's language model, and the tensors by their names in a verifier.

    Raises:
        CheckpointError: if it has another layout, or cannot be read.
        HubError: if it cannot be fetched.

    """
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise CheckpointError(f"config.json of {repository.name} has no transformer_layer_config.")
    tensors: dict[str, TensorInfo] = {}
    for name, info in read_tensors(repository).items():
        start = next((it for it in NAMES if name.startswith(it)), None)
        if start is not None:
            native = NAMES[start] + name.removeprefix(start)
            tensors[native] = info
        elif name in OF_THE_VERIFIER:
            logger.info(f"{name} of {repository.name} is the verifier's, and is left out")
        else:
            raise CheckpointError(
                f"{repository.name} has {name}, which no MTP of speculators 0.9 has; give the "
                "checkpoint as it was saved."
            )
    return dict(layer), tensors
