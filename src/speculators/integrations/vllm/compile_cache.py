"""The key under which vLLM keeps compiled graphs, with the draft's config in it.

Up to 0.29, vLLM's key leaves out the config of a draft of ``method: eagle``. A draft would run the
graph that was compiled for an earlier one: with that one's features, ``rms_norm_eps`` or RoPE.
"""

from hashlib import sha256
from typing import Any

from speculators.integrations.vllm.models import MODELS

__all__ = ["add_draft_to_key"]


def add_draft_to_key(speculative_config: type[Any]) -> None:
    """Let vLLM's ``SpeculativeConfig.compute_hash`` cover drafts whose model comes from here.

    So it is in vLLM's own key from 0.30 on; there, this changes keys but separates nothing more.
    """
    without_draft = speculative_config.compute_hash

    def compute_hash(self: Any) -> str:
        key: str = without_draft(self)
        draft = self.draft_model_config
        if draft is None or MODELS.keys().isdisjoint(draft.architectures):
            return key
        return sha256(f"{key} {draft.compute_hash()}".encode()).hexdigest()

    speculative_config.compute_hash = compute_hash
