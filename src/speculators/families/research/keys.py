"""The keys of a research checkpoint's config.json: what each means to a decoder layer, as tables.

A key is one of four: the layer computes with it (``SPELLINGS`` has its other names); it is known to
change results in a way that a converted draft cannot say (``CHANGES``), which stops the conversion
unless its value is a neutral one; it is known to be without effect (``WITHOUT_EFFECT``); or nothing
is known of it, which is reported.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.checkpoint.verifier import TEXT_CONFIGS
from speculators.errors import ConversionError, printable
from speculators.format.config import LayerConfig

__all__ = [
    "CANONICAL",
    "CHANGES",
    "HINTS",
    "LLAMA_LIKE",
    "NESTED",
    "SPELLINGS",
    "WITHOUT_EFFECT",
    "Key",
    "SourceKeys",
    "is_neutral",
]

NESTED = (*TEXT_CONFIGS, "model_config", "model")
"""Keys whose object holds a language model's keys in the configs of models of several parts."""

MOST_NESTED = 3

SPELLINGS = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "head_dim": ("kv_channels", "attention_head_dim", "head_size"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "rms_norm_eps": (
        "layer_norm_eps",
        "norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "rms_norm_epsilon",
        "norm_epsilon",
    ),
    "rope_theta": ("rotary_emb_base", "rotary_base", "rope_base", "rotary_embedding_base"),
    "max_position_embeddings": (
        "n_positions",
        "n_ctx",
        "max_sequence_length",
        "max_seq_len",
        "seq_length",
    ),
}
"""Key of the layer's config → other names that models give to the same."""

CANONICAL = {other: key for key, others in SPELLINGS.items() for other in others}

MUST_AGREE = {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
}
"""Keys that the layer computes with: two values of them are not a choice to be made here."""

SYNONYMS = {"swish": "silu"}

HINTS = {
    "attention_bias": "attention_bias",
    "qkv_bias": "attention_bias",
    "use_qkv_bias": "attention_bias",
    "add_qkv_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "use_bias": "biases",
    "add_bias_linear": "biases",
    "attention_out_bias": "attention_out_bias",
}
"""Key → the feature that it claims, in every family; the tensors decide."""

LLAMA_LIKE = {
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_moe",
    "eagle",
}
"""The ``model_type`` of models whose layers compute as Llama's do with the tensors of a draft."""

Neutral = tuple[Any, ...] | Callable[[LayerConfig], Any]


def _scale(config: LayerConfig) -> float:
    """What the products of queries and keys are multiplied by: 1 / sqrt(size of a head)."""
    return float((config.head_dim or 1) ** -0.5)


CHANGES: dict[str, Neutral] = {
    # positions
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "rope_pct": (1,),
    "rotary_emb_fraction": (1,),
    "rotary_dim": lambda config: config.head_dim,
    "rotary_ndims": lambda config: config.head_dim,
    "rope_local_base_freq": lambda config: config.rope_theta,
    "local_rope_theta": lambda config: config.rope_theta,
    "global_rope_theta": lambda config: config.rope_theta,
    "swa_rope_theta": lambda config: config.rope_theta,
    "mrope_section": (),
    "mrope_interleaved": (False,),
    "use_mrope": (False,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_interleaved": (False,),
    "no_rope_layers": (1,),
    "no_rope_layer_interval": (0,),
    "nope_layer_interval": (0,),
    "use_rope": (True,),
    "alibi": (False,),
    "use_alibi": (False,),
    "position_embedding_type": ("rope", "rotary"),
    # multipliers
    "residual_multiplier": (1,),
    "residual_scale": (1,),
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "embed_scale": (1,),
    "scale_embedding": (False,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": lambda config: config.hidden_size,
    "attention_multiplier": _scale,
    "attention_scale": _scale,
    "softmax_scale": _scale,
    "query_pre_attn_scalar": lambda config: config.head_dim,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "attention_in_multiplier": (1,),
    "attention_out_multiplier": (1,),
    "key_multiplier": (1,),
    "mlp_multipliers": (1,),
    "lm_head_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "logits_scale": (1,),
    "mup_width_multiplier": (1,),
    # attention
    "attn_logit_softcapping": (0,),
    "attention_logit_softcapping": (0,),
    "attn_logits_soft_cap": (0,),
    "final_logit_softcapping": (0,),
    "logits_soft_cap": (0,),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_query_key_norm": (False,),
    "attn_output_gate": (False,),
    "use_gated_attention": (False,),
    "dual_chunk_attention_config": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "pruned_heads": (),
    # norms and residuals
    "norm_type": ("rms_norm", "rmsnorm", "RMSNorm", "rms"),
    "rms_norm_add_unit_offset": (False,),
    "zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "sandwich_norm": (False,),
    "use_sandwich_norm": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "parallel_block": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    # the feed-forward network
    "swiglu_limit": (),
    "swiglu_alpha": (),
}
"""Key that changes what a layer computes → the values with which it does not; ``null`` is always
one. Of a list, every element has to be neutral."""


def _because(reason: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), reason)


WITHOUT_EFFECT = {
    **_because(
        "it is about training",
        """attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
        resid_pdrop embd_pdrop attn_pdrop dropout residual_dropout embedding_dropout resid_dropout
        classifier_dropout layerdrop initializer_factor router_aux_loss_coef router_jitter_noise
        router_z_loss_coef output_router_logits aux_loss_alpha seq_aux tf_legacy_loss loss_type
        gradient_checkpointing use_gradient_checkpointing embedding_initializer_range""",
    ),
    **_because(
        "it is about how a model is loaded and run",
        """use_cache _attn_implementation attn_implementation _attn_implementation_autoset
        _attn_implementation_internal _flash_attn_2_enabled use_flash_attn use_flash_attention
        use_flash_attention_2 torchscript use_bfloat16 bf16 fp16 fp32 pretraining_tp _name_or_path
        name_or_path transformers_version auto_map tokenizer_class return_dict
        output_hidden_states output_attentions return_dict_in_generate chunk_size_feed_forward
        cache_implementation _commit_hash unsloth_fixed unsloth_version""",
    ),
    **_because(
        "it is about generation",
        """max_length min_length do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
        output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens generation_config
        prefix task_specific_params sep_token_id unk_token_id mask_token_id
        decoder_start_token_id""",
    ),
    **_because(
        "a draft only decodes",
        """is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
        tie_encoder_decoder problem_type num_labels id2label label2id finetuning_task""",
    ),
    **_because(
        "the layer is dense, as its tensors show",
        """num_experts num_experts_per_tok num_local_experts moe_intermediate_size
        shared_expert_intermediate_size n_routed_experts n_shared_experts norm_topk_prob
        decoder_sparse_step mlp_only_layers first_k_dense_replace moe_layer_freq
        routed_scaling_factor scoring_func topk_method n_group topk_group
        interleave_moe_layer_step""",
    ),
    **_because(
        "it is about a part of the verifier that a draft does not have",
        """vision_config audio_config image_token_id video_token_id audio_token_id
        vision_start_token_id vision_end_token_id vision_token_id image_token_index
        video_token_index audio_token_index boi_token_index eoi_token_index boi_token_id
        eoi_token_id mm_tokens_per_image projector_hidden_act vision_feature_layer
        vision_feature_select_strategy multimodal_projector_bias image_seq_length
        spatial_merge_size num_nextn_predict_layers""",
    ),
    **_because("the tensors decide", "model_type num_hidden_layers draft_num_hidden_layers"),
    **_because("a hint: the tensors decide", " ".join(["bias", *HINTS])),
    **_because("that of the tensors is written", "dtype torch_dtype"),
    **_because("it is about an export that speculators wrote", "exported_by exported_zeros"),
    "architectures": "the draft's own are written",
}
"""Key → why it has no effect. A closed list: a key that is not in it is reported."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the source's config.

    Attributes:
        path: where it stands, such as ``text_config.n_head``.
        name: what the layer's config calls it, such as ``num_attention_heads``.
        value: its value.

    """

    path: str
    name: str
    value: Any

    @property
    def plain(self) -> str:
        """Its own name, without the path."""
        return self.path.rpartition(".")[2]

    @property
    def shown(self) -> str:
        """Its value, safe to show in a message."""
        return printable(repr(self.value))


class SourceKeys:
    """The keys of a source's config, wherever they stand and however they are spelled.

    Args:
        config: the parsed config.json.
        where: the file, for messages.

    Attributes:
        all: every key; an object that holds a language model's keys is replaced by those.
        opened: the paths of those objects.
        discrepancies: clauses on keys that have two values, of which one is used.

    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.opened: list[str] = []
        self.all = list(_flattened(config, self.opened))
        self.discrepancies: list[str] = []
        self._told: set[str] = set()

    def named(self, name: str) -> list[Key]:
        """The keys of this name or another spelling of it, the best spelling first."""
        found = [key for key in self.all if key.name == name]
        return sorted(found, key=lambda key: (key.path.count("."), key.plain != name))

    def find(self, name: str) -> Key | None:
        """The key of this name; one that is not ``null`` if there is any.

        Raises:
            ConversionError: if the layer computes with it, and the config gives two values.

        """
        named = self.named(name)
        given = [key for key in named if key.value is not None]
        for other in given[1:]:
            first = given[0]
            if _same(first.value, other.value):
                continue
            both = f"{first.path} {first.shown} and {other.path} {other.shown}"
            if name in MUST_AGREE:
                raise ConversionError(
                    f"{self.where} gives {both}, which mean the same; remove the one that the "
                    "draft was not trained with."
                )
            if other.path not in self._told:
                self._told.add(other.path)
                self.discrepancies.append(f"the config gives {both}; the first is used")
        return given[0] if given else next(iter(named), None)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the key of this name; the default if there is none."""
        found = self.find(name)
        return default if found is None else found.value


def is_neutral(value: Any, neutral: Neutral, config: LayerConfig) -> bool:
    """Whether a key of ``CHANGES`` with this value changes nothing."""
    neutrals = (neutral(config),) if callable(neutral) else neutral
    values = value if isinstance(value, list) else [] if value == {} else [value]
    return all(it is None or any(_same(it, other) for other in neutrals) for it in values)


def _flattened(config: Mapping[str, Any], opened: list[str], path: str = "") -> Iterator[Key]:
    for key, value in config.items():
        shown = printable(key)
        if key in NESTED and isinstance(value, dict) and path.count(".") < MOST_NESTED:
            opened.append(path + shown)
            yield from _flattened(value, opened, f"{path}{shown}.")
        else:
            yield Key(path + shown, CANONICAL.get(key, shown), value)


def _same(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if numbers:
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(SYNONYMS.get(str(one), one) == SYNONYMS.get(str(other), other))
