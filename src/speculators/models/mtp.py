"""The MTP of Qwen's models as a draft: computed from a directory that ``mtp cut`` made.

Position t fuses the embedding of token t+1 with the verifier's last hidden state at token t, after
its final norm, passes them through one decoder layer of the verifier's own kind with full
attention, and a norm. The result is what the verifier's head sees, and what is fed back at the next
position.
All norms multiply by 1 + their weight (vLLM 0.33.0, ``qwen3_next_mtp.py``, ``qwen3_5_mtp.py``).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.reader import read_config
from speculators.checkpoint.repository import Repository, open_repository
from speculators.checkpoint.verifier import open_verifier
from speculators.decode.loop import Generation, speculate
from speculators.errors import FormatError, VerifierError
from speculators.format.config import ProposalMethod
from speculators.format.proposals import resized
from speculators.models.layers import causal_inputs, frozen_linear
from speculators.models.output import DraftOutput, the_cache
from speculators.models.placement import device_of
from speculators.models.tensors import read_planned, read_tensor
from speculators.mtp.computed import computed_as
from speculators.mtp.cut import read_mtp, tensors_of
from speculators.mtp.experts import restacked
from speculators.mtp.types import language_config

__all__ = ["QwenMtp"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where transformers has a kind of decoder layer.

    Attributes:
        module: the module of its models, without the prefix of the two files in it.
        prefix: what the names of its classes begin with.
        config: the class of its config.

    """

    module: str
    prefix: str
    config: str


KINDS = {
    "qwen3_next": _Kind("qwen3_next", "Qwen3Next", "Qwen3NextConfig"),
    "qwen3_5": _Kind("qwen3_5", "Qwen3_5", "Qwen3_5TextConfig"),
    "qwen3_5_moe": _Kind("qwen3_5_moe", "Qwen3_5Moe", "Qwen3_5MoeTextConfig"),
}
"""By what ``computed_as`` says."""

MODULES = {
    "mtp.fc.": "fc.",
    "mtp.norm.": "norm.",
    "mtp.pre_fc_norm_embedding.": "pre_fc_norm_embedding.",
    "mtp.pre_fc_norm_hidden.": "pre_fc_norm_hidden.",
    "mtp.layers.0.": "layer.",
}
"""How the name of a tensor begins → how that of its parameter does."""


class QwenMtp(nn.Module):
    """An MTP of Qwen3-Next or Qwen3.5 as a draft; see ``load``.

    It reads the verifier's last hidden state, and takes embedding and head from the verifier.
    """

    def __init__(self, kind: str, config: Mapping[str, Any], *, experts: bool) -> None:
        super().__init__()
        place = KINDS[kind]
        package = f"transformers.models.{place.module}"
        configs = import_module(f"{package}.configuration_{place.module}")
        models = import_module(f"{package}.modeling_{place.module}")
        one_layer = {
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [] if experts else [0],
        }
        said = {key: value for key, value in config.items() if key not in {"model_type", "dtype"}}
        self.config = getattr(configs, place.config)(**said | one_layer)
        # transformers chooses implementations only for the config of a whole model.
        self.config._attn_implementation = "sdpa"
        self.config._experts_implementation = "eager"
        hidden, eps = self.config.hidden_size, self.config.rms_norm_eps
        norm = getattr(models, f"{place.prefix}RMSNorm")
        text = "" if hasattr(models, f"{place.prefix}RotaryEmbedding") else "Text"
        self.pre_fc_norm_embedding = norm(hidden, eps=eps)
        self.pre_fc_norm_hidden = norm(hidden, eps=eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = getattr(models, f"{place.prefix}DecoderLayer")(self.config, layer_idx=0)
        self.norm = norm(hidden, eps=eps)
        self.rotary_emb = getattr(models, f"{place.prefix}{text}RotaryEmbedding")(self.config)
        # Not submodules: moving or casting the draft must not touch what is the verifier's.
        self._borrowed: tuple[nn.Module, ...] = ()
        self._verifier: tuple[PreTrainedModel, ...] = ()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        verifier: PreTrainedModel | str | os.PathLike[str],
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> "QwenMtp":
        """Load an MTP that is not quantized.

        Args:
            directory: a directory that ``mtp cut`` made, or any checkpoint with the MTP, or a
                Hugging Face id of one.
            verifier: a loaded model, which ``generate`` needs; or its directory or Hub id, of which
                only the embedding and the head are read.
            revision: a branch, tag or commit of ``directory`` on the Hub.
            cache_dir: where downloads are kept.

        Raises:
            CheckpointError, HubError: if it cannot be read or fetched, or has no complete MTP.
            FormatError: if it is of another type, quantized, or has several layers.
            VerifierError: if the verifier does not fit.

        """
        hub = HubAccess(cache_dir)
        repository = open_repository(directory, hub, revision=revision, one_file=True)
        return cls.read(repository, read_config(repository)[0], verifier=verifier)

    @classmethod
    def read(
        cls,
        repository: Repository,
        config: dict[str, Any],
        *,
        verifier: PreTrainedModel | str | os.PathLike[str],
    ) -> "QwenMtp":
        """Load an MTP of which the config.json was read already; see ``load``."""
        mtp = read_mtp(repository, config)
        tensors = tensors_of(mtp, repository)
        kind = computed_as(repository.name, config, mtp, tensors)
        planned = restacked(tensors, "fused")
        experts = any(".experts." in name for name in planned)
        draft = cls(kind, language_config(config), experts=experts)
        weights = {}
        for name, tensor in planned.items():
            start = next((it for it in MODULES if name.startswith(it)), None)
            if start is None:
                raise FormatError(f"{repository.name} has {name}, which is not computed.")
            weights[MODULES[start] + name.removeprefix(start)] = read_planned(tensor)
        draft.to(weights["fc.weight"].dtype)
        try:
            draft.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise FormatError(f"{repository.name} does not hold its MTP: {reason}") from error
        draft.attach_verifier(verifier, cache_dir=repository.hub.cache_dir)
        return draft.eval()

    def attach_verifier(
        self,
        verifier: PreTrainedModel | str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Take embedding and head from a verifier; see ``load``.

        Raises:
            VerifierError: if its hidden size or vocabulary is not the MTP's.

        """
        sizes = (self.config.vocab_size, self.config.hidden_size)
        if isinstance(verifier, PreTrainedModel):
            head, embedding = verifier.get_output_embeddings(), verifier.get_input_embeddings()
            if head is None or tuple(head.weight.shape) != sizes:
                raise VerifierError(
                    f"The MTP does not fit {type(verifier).__name__}: its vocabulary and hidden "
                    f"size are {sizes}; attach the model that it was cut from."
                )
            self._borrowed, self._verifier = (embedding, head), (verifier,)
            return
        opened = open_verifier(verifier, HubAccess(cache_dir))
        opened.check_fits(sizes[1], sizes[0])
        to: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        rows = nn.Embedding.from_pretrained(read_tensor(opened.embedding()).to(**to))
        head = frozen_linear(read_tensor(opened.head()).to(**to))
        self._borrowed, self._verifier = (rows, head), ()

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.fc.weight.dtype

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """See ``decode.drafter.Draft``: the last hidden state, after the final norm."""
        return ()

    @property
    def verifier_vocab_size(self) -> int:
        """The size of the verifier's vocabulary."""
        vocabulary: int = self.config.vocab_size
        return vocabulary

    def project(self, verifier_states: Tensor) -> Tensor:
        """What the first input is made of: the verifier's states themselves."""
        return verifier_states.to(device=self.device, dtype=self.dtype)

    def to_verifier(self, tokens: Tensor) -> Tensor:
        """The verifier's ids of the draft's tokens: the same."""
        return tokens

    def draft(
        self,
        input_ids: Tensor,
        states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
    ) -> DraftOutput:
        """Run it, without the head.

        Args:
            input_ids: (batch, sequence), the token after each state's.
            states: (batch, sequence, hidden), the verifier's, or an earlier output.
            attention_mask: as for ``Speculator.forward``, as all others are.
            position_ids: (batch, sequence), those of the states; they continue from the cache if
                not given.
            past_key_values: the cache that an earlier call returned.
            use_cache: return a cache.
            cache: the other name of ``past_key_values``.

        """
        kept = the_cache(cache, past_key_values)
        if use_cache and kept is None:
            kept = DynamicCache(config=self.config)
        embedding = self._borrowed[0]
        embedded = embedding(input_ids.to(device_of(embedding))).to(self.device, self.dtype)
        fused = self.fc(
            torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)), -1)
        )
        inputs = causal_inputs(self.config, fused, attention_mask, position_ids, kept)
        positions = inputs["position_ids"]
        if self._has_three:
            # Of the three positions that Qwen3.5 rotates by, text has one.
            positions = positions[None].expand(3, -1, -1)
        rotation = self.rotary_emb(fused, positions)
        output = self.layer(fused, position_embeddings=rotation, **inputs)
        return DraftOutput(last_hidden_state=self.norm(output), cache=kept)

    def logits(self, states: Tensor) -> Tensor:
        """The logits of its outputs: (..., hidden) → (..., vocabulary)."""
        head: Any = self._borrowed[1]
        logits: Tensor = head(states.to(device=device_of(head), dtype=head.weight.dtype))
        return logits

    def generate(
        self,
        input_ids: Tensor,
        *,
        proposal: ProposalMethod | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Generation:
        """Generate what the verifier's own ``generate`` would, in fewer verifier passes.

        Args:
            input_ids: (batch, length), prompts, padded at the left.
            proposal: how to propose; a greedy chain if not given.
            generation_config: as for the verifier's ``generate``.
            **kwargs: as for the verifier's ``generate``.

        Raises:
            VerifierError: if only files of the verifier were given.
            GenerationError: if the settings or the verifier do not allow it. Verifiers with linear
                attention, as Qwen3-Next and Qwen3.5 have it, verify chains and no trees.

        """
        if not self._verifier:
            raise VerifierError("Generating needs the whole verifier; attach the loaded model.")
        return speculate(
            self,
            self._verifier[0],
            input_ids,
            proposal=proposal or self.proposal_method(),
            generation=generation_config,
            **kwargs,
        )

    def proposal_method(
        self, proposal: str | None = None, num_draft_tokens: int | None = None
    ) -> ProposalMethod:
        """The proposal method of a type and a size, with the defaults of its type."""
        method = ProposalMethod(proposal_type=proposal or "greedy")
        return method if num_draft_tokens is None else resized(method, num_draft_tokens)

    @property
    def _has_three(self) -> bool:
        return hasattr(self.rotary_emb, "mrope_section")
