"""DFlash drafts as transformers models, and what DFlash 2 and DSpark share with them.

A DFlash draft turns several of the verifier's hidden states into a context: ``fc`` projects them to
its own width, ``hidden_norm`` normalises them, and each layer projects them to keys and values of
its own. On a block of the last certain token (the anchor) and masks, its layers then attend to the
context and to the block, within a window where they slide, and to later positions of the block
where they are not causal (DFlash, arXiv:2602.06036; PyPI's dflash 0.1.0, model.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, rotate_half
from typing_extensions import Self

from speculators.checkpoint.files.torch_file import read_torch_entries
from speculators.checkpoint.tensor import TensorInfo
from speculators.decode.cache import BlockCache
from speculators.decode.refusals import left_padding
from speculators.errors import FormatError
from speculators.families.converted import Converted
from speculators.families.dflash import DFLASH
from speculators.families.dflash.config import MASK_FILE, SLIDING
from speculators.format.config import ProposalMethod, SpeculatorsConfig
from speculators.format.proposals import proposal_method
from speculators.models.config import SpeculatorPretrainedConfig
from speculators.models.layers import LAYER_CLASSES
from speculators.models.output import CACHE, DraftOutput, the_cache
from speculators.models.placement import device_of
from speculators.models.speculator import Speculator
from speculators.models.tensors import read_tensor

__all__ = ["DFlashSpeculator", "DFlashSpeculatorConfig"]


class DFlashSpeculatorConfig(SpeculatorPretrainedConfig):
    """The config of a ``DFlashSpeculator``; its JSON is ``families.dflash.config.DFlashConfig``.

    Attributes:
        transformer_layer_config: a transformers config for the draft's decoder layers, of
            ``model_type`` ``qwen3``; ``vocab_size`` is the verifier's.
        draft_vocab_size: how many tokens the draft can propose; all of the verifier's if not given.
        block_size: how many positions a block has, the anchor's included.
        target_hidden_size: the verifier's hidden size, if it is not the draft's.
        aux_hidden_state_layer_ids: which of the verifier's states are the context: number i is the
            residual stream that enters its decoder layer i.
        mask_token_id: the token that stands for those that are not drafted yet.
        mask_embedding: whether its embedding is that of the file mask_embedding.pt.
        sliding_window_non_causal: whether the positions of a block see later ones.
        sample_from_anchor: whether the anchor's position drafts a token, too.
        num_target_layers: how many layers the verifier has, if the config says so.
        speculators_config: proposal methods and the verifier, as a dictionary.

    """

    family = DFLASH
    has_no_defaults_at_init = True  # which states the draft reads has no default

    draft_vocab_size: int | None = None
    block_size: int | None = None
    target_hidden_size: int | None = None
    aux_hidden_state_layer_ids: list[int] | None = None
    mask_token_id: int | None = None
    mask_embedding: bool | None = None
    sliding_window_non_causal: bool = True
    sample_from_anchor: bool = False
    num_target_layers: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        layer = self.transformer_layer_config
        if isinstance(layer, dict) and SLIDING in (layer.get("layer_types") or ()):
            # Otherwise transformers forgets the window.
            self.transformer_layer_config = layer | {"use_sliding_window": True}
        super().__post_init__(**kwargs)
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.layer.vocab_size

    @property
    def speculators(self) -> SpeculatorsConfig:
        """``speculators_config``, with defaults filled in: a chain of all that a block drafts."""
        config = super().speculators
        said = self.speculators_config or {}
        if self.block_size is None or "proposal_methods" in said:
            return config
        drafted = self.block_size - (not self.sample_from_anchor)
        return config.model_copy(
            update={"proposal_methods": [ProposalMethod(speculative_tokens=drafted)]}
        )

    @property
    def draft_architectures(self) -> list[str]:
        """The class by which upstream knows the draft."""
        return [one.replace("Speculator", "DraftModel") for one in super().draft_architectures]

    def _layer_keys(self) -> dict[str, Any]:
        # Here layer_types is not what transformers derives: it says which layers slide.
        return super()._layer_keys() | {"layer_types": list(self.layer.layer_types)}


class InterleavedNorm(Qwen3RMSNorm):
    """The norm of queries or keys whose RoPE turns neighbouring channels, 2i and 2i + 1.

    It puts the even channels before the odd ones, so that the usual RoPE, which turns channel i
    with i + half, turns the same pairs. Products of queries and keys do not see the order.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise and reorder, (..., head size)."""
        normed: Tensor = super().forward(hidden_states)
        return torch.cat((normed[..., 0::2], normed[..., 1::2]), -1)


class DFlashSpeculator(Speculator):
    """A DFlash draft: projection of the context, decoder layers and the final norm.

    Args:
        config: see ``DFlashSpeculatorConfig``.
        own_embedding: whether the draft has its own embedding; otherwise it uses the verifier's.
        own_head: whether it has its own head although it can draft all of the verifier's tokens;
            otherwise it uses the verifier's. A draft of fewer tokens always has its own.

    Attributes:
        d2t: (draft vocabulary,), int64: token i of the draft is token i + d2t[i] of the verifier;
            ``None`` if the vocabularies are the same.
        t2d: (vocabulary,), bool: which of the verifier's tokens the draft has; likewise.
        mask_embedding: (hidden,), the embedding of the mask token, if it is not the row of the
            embedding.

    Raises:
        FormatError: if the draft uses an embedding or a head of the verifier, whose width is
            another one.

    """

    config_class = DFlashSpeculatorConfig  # type: ignore[misc]
    config: DFlashSpeculatorConfig
    _no_split_modules = ["Qwen3DecoderLayer"]  # noqa: RUF012
    # Its layers always take a mask: they are neither causal, nor do they see each position.
    _supports_flash_attn = False
    _supports_flex_attn = False
    supports_gradient_checkpointing = False  # the context is written to a cache once

    d2t: Tensor | None
    t2d: Tensor | None
    mask_embedding: Tensor | None

    def __init__(
        self,
        config: DFlashSpeculatorConfig,
        own_embedding: bool = False,
        own_head: bool = False,
    ) -> None:
        super().__init__(config, own_embedding)
        checked: Any = config.checked()
        layer_config, classes = config.layer, LAYER_CLASSES[config.layer.model_type]
        sizes, width = checked.sizes, checked.verifier_hidden_size
        hidden, drafted = sizes["hidden"], checked.draft_vocab_size
        reduced = "draft_vocabulary" in checked.features
        own_head = own_head or reduced
        for own, name in ((own_embedding, "embedding"), (own_head, "head")):
            if not own and width != hidden:
                raise FormatError(
                    f"The draft has no {name} of its own, and cannot use the verifier's, whose "
                    f"width is {width} (target_hidden_size), not {hidden}; convert it from a "
                    f"checkpoint with its {name}."
                )
        self.block_size: int = checked.block_size
        self.drafted_per_block: int = checked.drafted_per_block
        self.mask_token_id: int = checked.mask_token_id
        self.attention = tuple(
            zip(checked.causal, checked.transformer_layer_config.windows, strict=True)
        )
        self.fc = nn.Linear(sizes["states"], hidden, bias=False)
        self.hidden_norm = classes.norm(hidden, eps=layer_config.rms_norm_eps)
        self.layers = nn.ModuleList(
            self._decoder_layer(index) for index in range(layer_config.num_hidden_layers)
        )
        if not checked.transformer_layer_config.is_neox_style:
            for layer in self.layers:
                for name in ("q_norm", "k_norm"):
                    norm = InterleavedNorm(sizes["head"], eps=layer_config.rms_norm_eps)
                    setattr(layer.self_attn, name, norm)
        self.rotary_emb = classes.rotary_embedding(layer_config)
        self.norm = classes.norm(hidden, eps=layer_config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, drafted, bias=False) if own_head else None
        vocabulary = torch.arange(sizes["vocabulary"])
        self.register_buffer("d2t", torch.zeros(drafted, dtype=torch.int64) if reduced else None)
        self.register_buffer("t2d", vocabulary < drafted if reduced else None)
        # Not among the weights: it has a file of its own.
        self.register_buffer(
            "mask_embedding", torch.zeros(hidden) if config.mask_embedding else None, False
        )
        self._add_parts()
        self.post_init()  # type: ignore[no-untyped-call]

    def _decoder_layer(self, index: int) -> nn.Module:
        """A decoder layer; its parts have the names that checkpoints give them."""
        layer_config = self.config.layer
        return LAYER_CLASSES[layer_config.model_type].decoder_layer(layer_config, layer_idx=index)

    def _add_parts(self) -> None:
        """Add what a kind of draft has besides the layers."""

    @classmethod
    def from_converted(cls, converted: Converted, **kwargs: Any) -> Self:
        """Load a draft that has been opened already; see ``from_pretrained``."""
        model = super().from_converted(converted, own_head="head" in converted.features, **kwargs)
        if model.mask_embedding is not None:
            vector = _read_mask_embedding(
                converted.checkpoint.companions[MASK_FILE].file, len(model.mask_embedding)
            )
            model.mask_embedding = vector.to(device=model.device, dtype=model.fc.weight.dtype)
        return model

    def _save(self, directory: Path, name: str | None, **kwargs: Any) -> None:
        super()._save(directory, name, **kwargs)
        if self.mask_embedding is not None and kwargs.get("is_main_process", True):
            torch.save(self.mask_embedding.cpu(), directory / MASK_FILE)

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """Which of the verifier's states the draft reads."""
        return tuple(self.config.aux_hidden_state_layer_ids or ())

    def proposal_method(
        self, proposal: ProposalMethod | str | None = None, num_draft_tokens: int | None = None
    ) -> ProposalMethod:
        """The proposal method that ``generate`` would use with these arguments.

        A chain has as many tokens as a block drafts, where neither the arguments nor the config
        say how many.
        """
        if isinstance(proposal, ProposalMethod):
            return super().proposal_method(proposal, num_draft_tokens)
        known = self.config.speculators
        return proposal_method(known, proposal, num_draft_tokens, self.drafted_per_block)

    def project(self, hidden_states: Tensor) -> Tensor:
        """The context that the layers turn into keys and values, from the verifier's states.

        Args:
            hidden_states: (batch, sequence, states * verifier width), those of ``verifier_layers``
                concatenated, of any floating dtype and on any device.

        Returns:
            (batch, sequence, hidden), on the draft's device and in its dtype.

        """
        states = hidden_states.to(device=self.device, dtype=self.fc.weight.dtype)
        context: Tensor = self.hidden_norm(self.fc(states))
        return context

    def remember(
        self, hidden_states: Tensor, counts: Sequence[int] | Tensor, cache: BlockCache
    ) -> None:
        """Write the keys and values of new context to a cache, and confirm them there.

        Args:
            hidden_states: as for ``project``, at the tokens that follow those in the cache; rows
                with fewer of them are padded at the right.
            counts: by row, the number of tokens without padding.
            cache: of this draft.

        """
        context = self.project(hidden_states)
        depths = torch.arange(context.shape[1], device=context.device)[None]
        positions = cache.positions(depths, context.device)
        rotation: tuple[Tensor, Tensor] = self.rotary_emb(context, position_ids=positions)
        for index, layer in enumerate(self.layers):
            cache.update(*_keys_and_values(layer.self_attn, context, rotation), index)
        cache.confirm(counts)

    def run_block(self, tokens: Tensor, cache: BlockCache) -> Tensor:
        """Run the layers and the final norm on a block, which the cache does not keep.

        Args:
            tokens: (batch, block), the anchor and masks, by the verifier's ids; at the positions
                that follow the context.
            cache: holds the context; of this draft.

        Returns:
            (batch, block, hidden), on the draft's device.

        """
        x = self._embed_block(tokens)
        length, device = tokens.shape[1], self.device
        depths = torch.arange(length, device=device)[None]
        masks = {
            kind: cache.mask(
                length,
                x.dtype,
                device,
                block=_block_mask(length, *kind, device),
                window=kind[1],
                depths=depths,
            )
            for kind in set(self.attention)
        }
        positions = cache.positions(depths, device)
        attention: dict[str, Any] = {
            "position_ids": positions,
            "position_embeddings": self.rotary_emb(x, position_ids=positions),
            "use_cache": True,
            CACHE: cache,
        }
        for layer, kind in zip(self.layers, self.attention, strict=True):
            x = layer(x, attention_mask=masks[kind], **attention)
        output: Tensor = self.norm(x)
        return output.to(device)

    def _embed_block(self, tokens: Tensor) -> Tensor:
        """The first layer's input, (batch, block, hidden)."""
        embedded = self._embed(tokens)
        if self.mask_embedding is not None:
            masked = (tokens == self.mask_token_id).to(embedded.device)[:, :, None]
            embedded = torch.where(masked, self.mask_embedding.to(embedded), embedded)
        return embedded

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> DraftOutput:
        """Run ``forward`` without the head; ``logits`` is ``None`` in the output.

        All arguments are as for ``forward``.
        """
        cache = past_key_values
        if cache is None:
            rows = len(input_ids)
            padding = [0] * rows if hidden_states is None else _padding(rows, attention_mask)
            cache = BlockCache(padding)
        elif not isinstance(cache, BlockCache):
            raise ValueError(
                "A cache of this draft holds its context only; pass on the one that an earlier "
                "call returned."
            )
        if hidden_states is not None:
            self.remember(hidden_states, [hidden_states.shape[1]] * len(input_ids), cache)
        keeps = use_cache or past_key_values is not None
        return DraftOutput(
            last_hidden_state=self.run_block(input_ids, cache), cache=cache if keeps else None
        )

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> DraftOutput | tuple[Any, ...]:
        """Compute the logits of the tokens that a block drafts.

        The context is the verifier's states at all tokens before the anchor, whose own state is not
        known yet: those of earlier calls, which are in the cache, and then ``hidden_states``. The
        block's positions follow the context's.

        Args:
            input_ids: (batch, block), the anchor and then masks (``mask_token_id``). A block may be
                shorter than ``block_size``; it then drafts as many tokens fewer.
            hidden_states: (batch, length, states * verifier width), the verifier's states at the
                tokens that follow those in the cache, those of ``verifier_layers`` concatenated;
                of any floating dtype.
            attention_mask: (batch, length), 0 where ``hidden_states`` are padding, at the left;
                only without a cache, which knows its padding.
            past_key_values: the cache that an earlier call returned. It keeps the context, not the
                block.
            use_cache: return a cache; implied by ``past_key_values``.
            return_dict: ``False`` for a tuple instead of a ``DraftOutput``.
            cache: the other name of ``past_key_values``.

        Returns:
            ``logits``, (batch, drafted, draft vocabulary), of the positions that draft a token: all
            but the anchor's, which drafts one only with ``sample_from_anchor``; and
            ``last_hidden_state``, (batch, block, hidden), of all positions, after the final norm.

        Raises:
            ValueError: if the cache is of another kind.
            VerifierError: if there is no head or embedding, because no verifier is attached and
                the one that the config names was not available.

        """
        self._head()  # fail before the work, not after it
        output = self.draft(
            input_ids, hidden_states, attention_mask, the_cache(cache, past_key_values), use_cache
        )
        assert output.last_hidden_state is not None
        output.logits = self.logits(self._drafting(output.last_hidden_state))
        return output if return_dict is not False else output.to_tuple()

    def _drafting(self, states: Tensor) -> Tensor:
        """The part of a block's outputs, (batch, block, hidden), that drafts tokens."""
        return states[:, self.block_size - self.drafted_per_block :]


def _read_mask_embedding(file: Path, hidden: int) -> Tensor:
    """The embedding, (hidden,), in a file that holds it by itself or in a dictionary."""
    entries = read_torch_entries(file)
    held = entries.get("embedding", entries.get(""))
    if not isinstance(held, TensorInfo) or held.elements != hidden:
        raise FormatError(
            f"{file} does not hold an embedding of {hidden} values; convert the draft again."
        )
    return read_tensor(held).flatten()


def _padding(rows: int, attention_mask: Tensor | None) -> list[int]:
    """By row, the number of padding positions at the left of the context."""
    return [0] * rows if attention_mask is None else left_padding(attention_mask, attention_mask)


def _block_mask(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which positions of a block see which others of it, (1, length, length).

    ``BlockCache.mask`` hides what lies before a window; a layer that is not causal sees no further
    ahead, either (PyPI's dflash 0.1.0, ``_attention_mask``).
    """
    ahead = 0 if causal else length - 1 if window is None else window - 1
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril(ahead)


def _keys_and_values(
    attention: Any, context: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What a layer reads of the context, each (batch, heads, length, head size)."""
    context = context.to(device_of(attention.k_proj))
    shape = (*context.shape[:-1], -1, attention.head_dim)
    keys = attention.k_norm(attention.k_proj(context).view(shape)).transpose(1, 2)
    values = attention.v_proj(context).view(shape).transpose(1, 2)
    cos, sin = (part.to(keys.device)[:, None] for part in rotation)
    return keys * cos + rotate_half(keys) * sin, values
