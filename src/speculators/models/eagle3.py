"""EAGLE-3, EAGLE-3.1 and P-EAGLE drafts as transformers models.

An EAGLE-3 draft reads several of the verifier's hidden states, which ``fc`` projects to its own
width, and has its own head, often over a part of the verifier's tokens. Its first layer attends
with the embedding of the next token beside the projected state (EAGLE-3, arXiv:2503.01840, section
3; SafeAILab/EAGLE, eagle/model/cnets.py). EAGLE-3.1 adds norms before ``fc``, and feeds back its
output after the final norm. P-EAGLE drafts several tokens in one pass, from masks in place of the
tokens and states that are not there yet.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from typing_extensions import Self

from speculators.errors import FormatError, InputError
from speculators.families.converted import Converted
from speculators.families.eagle3 import EAGLE3
from speculators.models.config import SpeculatorPretrainedConfig
from speculators.models.inputs import check_states
from speculators.models.layers import LAYER_CLASSES, LayerClasses
from speculators.models.output import DraftOutput
from speculators.models.placement import value_of
from speculators.models.speculator import Speculator

__all__ = ["Eagle3Speculator", "Eagle3SpeculatorConfig", "PEagleSpeculator"]


class Eagle3SpeculatorConfig(SpeculatorPretrainedConfig):
    """The config of an ``Eagle3Speculator``; its JSON is ``families.eagle3.Eagle3Config``.

    Attributes:
        speculators_model_type: ``eagle3``, or ``peagle`` for a draft that drafts in parallel.
        transformer_layer_config: a transformers config for the draft's decoder layers, of
            ``model_type`` ``llama`` or ``qwen3``; ``vocab_size`` is the verifier's.
        draft_vocab_size: how many tokens the draft can propose; all of the verifier's if not given.
        eagle_aux_hidden_state_layer_ids: which of the verifier's states the draft reads: number i
            is the residual stream that enters its decoder layer i.
        target_hidden_size: the verifier's hidden size, if it is not the draft's.
        norm_before_residual: whether the first layer's residual is the normalised state.
        norm_before_fc: whether the states are normalised together before ``fc``.
        fc_norm: whether each of the states is normalised by itself before ``fc``.
        norm_output: whether the output is fed back after the final norm.
        fc_bias: whether ``fc`` has a bias.
        mask_token_id: for ``peagle``, the token that stands for those that are not drafted yet.
        embed_requires_grad: whether the embedding was trained with the draft.
        speculators_config: proposal methods and the verifier, as a dictionary.

    """

    family = EAGLE3
    has_no_defaults_at_init = True  # which states the draft reads has no default

    draft_vocab_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    target_hidden_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool | None = None
    mask_token_id: int | None = None
    embed_requires_grad: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.layer.vocab_size

    @property
    def parallel(self) -> bool:
        """Whether all tokens are drafted in one pass (P-EAGLE)."""
        return self.speculators_model_type == "peagle"

    @property
    def draft_architectures(self) -> list[str]:
        """The class by which other software knows the draft."""
        return ["PEagleDraftModel"] if self.parallel else super().draft_architectures


class FirstLayer(nn.Module):
    """A decoder layer that attends with the embedding of the token beside the state before it.

    Args:
        config: of the layer.
        classes: of its type.
        norm_before_residual: whether the residual is the normalised state.

    """

    def __init__(self, config: Any, classes: LayerClasses, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        layer: Any = classes.decoder_layer(config, layer_idx=0)
        self.self_attn = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(
                2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None
            )
            setattr(self.self_attn, name, wide)
        self.input_layernorm = layer.input_layernorm
        self.hidden_norm = classes.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(self, embeddings: Tensor, states: Tensor, **attention: Any) -> Tensor:
        """The layer's output, (batch, sequence, hidden), from embeddings and states of that shape.

        ``attention`` is as for transformers' decoder layers.
        """
        normed = self.hidden_norm(states)
        both = torch.cat((self.input_layernorm(embeddings), normed), -1)
        attended, _ = self.self_attn(hidden_states=both, **attention)
        x = (normed if self.norm_before_residual else states) + attended
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Eagle3Speculator(Speculator):
    """An EAGLE-3 or EAGLE-3.1 draft: projection, decoder layers, and its own head.

    ``from_pretrained`` gives a ``PEagleSpeculator`` for a P-EAGLE draft.

    Args:
        config: see ``Eagle3SpeculatorConfig``.
        own_embedding: whether the draft has its own embedding; otherwise it uses the verifier's.

    Attributes:
        d2t: (draft vocabulary,), int64: token i of the draft is token i + d2t[i] of the verifier;
            ``None`` if the vocabularies are the same.
        t2d: (vocabulary,), bool: which of the verifier's tokens the draft has; likewise.

    Raises:
        FormatError: if the draft has no embedding of its own and cannot have the verifier's, whose
            width is another one; or if the config is that of a P-EAGLE draft.

    """

    config_class = Eagle3SpeculatorConfig  # type: ignore[misc]
    config: Eagle3SpeculatorConfig
    _no_split_modules = ["FirstLayer", "LlamaDecoderLayer", "Qwen3DecoderLayer"]  # noqa: RUF012

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: Eagle3SpeculatorConfig, own_embedding: bool = True) -> None:
        super().__init__(config, own_embedding)
        if config.parallel and not isinstance(self, PEagleSpeculator):
            raise FormatError("The config is that of a P-EAGLE draft; build a PEagleSpeculator.")
        checked = config.checked()
        layer_config, classes = config.layer, LAYER_CLASSES[config.layer.model_type]
        sizes = checked.sizes
        hidden, drafted, self.state_size = sizes["hidden"], sizes["drafted"], sizes["state"]
        if not own_embedding and self.state_size != hidden:
            raise FormatError(
                "The draft has no embedding of its own, and cannot use the verifier's, whose "
                f"width is {self.state_size} (target_hidden_size), not {hidden}; "
                "convert it from a checkpoint with embed_tokens.weight."
            )

        def norm(width: int) -> nn.Module:
            return classes.norm(width, eps=layer_config.rms_norm_eps)

        self.input_norm = norm(sizes["states"]) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(norm(self.state_size) for _ in self.verifier_layers)
            if config.fc_norm
            else None
        )
        self.fc = nn.Linear(sizes["states"], hidden, bias=bool(config.fc_bias))
        self.layers = nn.ModuleList(
            [FirstLayer(layer_config, classes, config.norm_before_residual)]
        )
        self.layers.extend(
            classes.decoder_layer(layer_config, layer_idx=index)
            for index in range(1, layer_config.num_hidden_layers)
        )
        self.rotary_emb = classes.rotary_embedding(layer_config)
        self.norm = norm(hidden)
        self.lm_head = nn.Linear(hidden, drafted, bias=False)
        reduced = "draft_vocabulary" in checked.features
        vocabulary = torch.arange(sizes["vocabulary"])
        self.register_buffer("d2t", torch.zeros(drafted, dtype=torch.int64) if reduced else None)
        self.register_buffer("t2d", vocabulary < drafted if reduced else None)
        # What stands for the verifier's states where it has not run yet.
        self.mask_hidden = (
            nn.Parameter(torch.zeros(1, 1, sizes["states"])) if config.parallel else None
        )
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_converted(cls, converted: Converted, **kwargs: Any) -> Self:
        """Load a draft that has been opened already; see ``from_pretrained``."""
        if cls is Eagle3Speculator and converted.config.speculators_model_type == "peagle":
            return PEagleSpeculator.from_converted(converted, **kwargs)  # type: ignore[return-value]
        return super().from_converted(converted, **kwargs)

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """Which of the verifier's states the draft reads."""
        return tuple(self.config.eagle_aux_hidden_state_layer_ids or ())

    def project(self, hidden_states: Tensor) -> Tensor:
        """What the draft's first input is made of, from the verifier's states.

        Args:
            hidden_states: (batch, sequence, states * verifier width), those of ``verifier_layers``
                concatenated, of any floating dtype and on any device.

        Returns:
            (batch, sequence, hidden), on the draft's device and in its dtype.

        """
        states = hidden_states.to(device=self.device, dtype=self.fc.weight.dtype)
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            parts = states.split(self.state_size, -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            states = torch.cat(normed, -1)
        projected: Tensor = self.fc(states)
        return projected

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DraftOutput:
        """Run ``forward`` without the head; ``logits`` is ``None`` in the output.

        ``hidden_states`` are projected, or an earlier output's ``last_hidden_state``.
        """
        device = self.device
        embeddings = self._embed(input_ids)
        x = hidden_states.to(device=device, dtype=self.fc.weight.dtype)
        cache, attention = self._attention_inputs(
            x, attention_mask, position_ids, past_key_values, use_cache
        )
        first, *others = self.layers
        x = first(embeddings, x, **attention, **kwargs)
        for layer in others:
            x = layer(x, **attention, **kwargs)
        if self.config.norm_output:
            x = self.norm(x)
        return DraftOutput(last_hidden_state=x.to(device), cache=cache)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the head, as ``forward`` does after the layers.

        Args:
            hidden_states: (batch, sequence, hidden), ``last_hidden_state`` or a part of it.

        Returns:
            (batch, sequence, draft vocabulary), in the head's dtype and on its device.

        """
        normed = hidden_states if self.config.norm_output else self.norm(hidden_states)
        return super().logits(normed)


class PEagleSpeculator(Eagle3Speculator):
    """A P-EAGLE draft: an EAGLE-3 draft that drafts several tokens in one pass.

    The first token follows from the last real position. Each further one follows from a position
    with the mask token and ``mask_hidden``, which stand for the token and the verifier's states
    that are not there yet.
    """

    @classmethod
    def from_converted(cls, converted: Converted, **kwargs: Any) -> Self:
        """Load a draft that has been opened already; see ``from_pretrained``."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and device_map.get("mask_hidden") == "disk":
            # Accelerate can offload modules only, and this is one small vector.
            kwargs["device_map"] = device_map | {"mask_hidden": "cpu"}
        return super().from_converted(converted, **kwargs)

    @property
    def mask_token_id(self) -> int:
        """The token that stands for those that are not drafted yet, by the verifier's ids."""
        token = self.config.mask_token_id
        assert token is not None
        return token

    def mask_state(self) -> Tensor:
        """What stands for the projected states where the verifier has not run, (1, 1, hidden)."""
        return self.project(value_of(self, "mask_hidden"))

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        num_draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> DraftOutput | tuple[Any, ...]:
        """Compute logits as ``Speculator.forward`` does, or those of several drafted tokens.

        Args:
            input_ids: as for ``Speculator.forward``, like all that are not listed.
            hidden_states: likewise.
            attention_mask: likewise.
            position_ids: likewise.
            *args: likewise.
            num_draft_tokens: draft this many tokens in the same pass: ``logits`` are then those of
                the drafted tokens, (batch, num_draft_tokens, draft vocabulary), and
                ``last_hidden_state`` and the cache have num_draft_tokens - 1 positions more, which
                are masks. Crop the cache before going on with it.
            **kwargs: likewise.

        Raises:
            InputError: with ``num_draft_tokens``, if there are no ``hidden_states``, or a 4D mask.
            VerifierError: as for ``Speculator.forward``.

        """
        if num_draft_tokens is None:
            return super().forward(
                input_ids, hidden_states, attention_mask, position_ids, *args, **kwargs
            )
        if hidden_states is None or (attention_mask is not None and attention_mask.dim() > 2):
            raise InputError(
                "num_draft_tokens takes the verifier's hidden_states, and no 4D attention_mask."
            )
        check_states(input_ids, hidden_states=(hidden_states, self._states_width))
        masks = (len(input_ids), num_draft_tokens - 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(masks)), 1)
        if position_ids is not None:
            later = torch.arange(1, num_draft_tokens, device=position_ids.device)
            position_ids = torch.cat((position_ids, position_ids[:, -1:] + later), 1)
        return super().forward(  # type: ignore[misc]  # args end before the named ones
            torch.cat((input_ids, input_ids.new_full(masks, self.mask_token_id)), 1),
            None,
            attention_mask,
            position_ids,
            *args,
            draft_states=torch.cat(
                (self.project(hidden_states), self.mask_state().expand(*masks, -1)), 1
            ),
            logits_to_keep=num_draft_tokens,
            **kwargs,
        )
