"""The types of MTP: how their tensors are named in a verifier's checkpoint, and who promises them.

Read off the loaders of vLLM 0.33.0 (``vllm/model_executor/models/*_mtp.py``,
``vllm/config/speculative.py``) and SGLang 0.5.23 (``sglang/srt/models/*_mtp.py``, ``*_nextn.py``).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

__all__ = [
    "BODY",
    "NAMED_ONLY",
    "PREFIX",
    "TYPES",
    "MtpType",
    "Shape",
    "find_dspark",
    "language_config",
    "model_types",
]

Shape = tuple[int, ...]
"""Sizes in hidden sizes: (1, 2) is a matrix of H rows and 2 H columns."""

PREFIX = r"(?:model\.|language_model\.)*"
"""What is before the name of a decoder layer."""

BODY = re.compile(rf"(?P<prefix>{PREFIX})layers\.(?P<layer>\d+)\.(?P<block>.+)")
"""The names of the tensors of a language model's decoder layers."""


@dataclass(frozen=True)
class MtpType:
    """A type of MTP.

    Attributes:
        name: its name for programs.
        title: its name in messages.
        model_types: the ``model_type`` of verifiers that have it, without a ``_text`` at the end.
        names: a pattern of the names of its tensors. The group ``layer`` is the number of an MTP
            layer. The group ``block``, if there is one, is what follows it where the MTP layer has
            the same tensors as a decoder layer of the verifier.
        once: tensors that there is one of, and their shapes. The first of these and of ``each``
            is one that no other type has.
        each: tensors of every layer, likewise, with ``{layer}`` for its number.
        key: the key of config.json that says how many layers there are.
        after_body: whether the MTP layers are numbered on from the verifier's decoder layers.

    """

    name: str
    title: str
    model_types: frozenset[str]
    names: str
    once: Mapping[str, Shape] = field(default_factory=dict)
    each: Mapping[str, Shape] = field(default_factory=dict)
    key: str = "num_nextn_predict_layers"
    after_body: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """``names``, compiled."""
        return re.compile(self.names)

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """A pattern of names that no other type has."""
        first, *_ = [*self.once, *self.each]
        module = re.escape(first.removesuffix(".weight")).replace(r"\{layer\}", r"\d+")
        return re.compile(rf"{PREFIX if self.after_body else ''}{module}\..+")


QWEN = MtpType(
    name="qwen",
    title="the MTP of Qwen's models",
    model_types=frozenset({"intern_s2_preview", "qwen3_5", "qwen3_5_moe"}),
    names=r"mtp\.(?:layers\.(?P<layer>\d+)\.(?P<block>.+)|.+)",
    once={
        "mtp.fc.weight": (1, 2),
        "mtp.pre_fc_norm_embedding.weight": (1,),
        "mtp.pre_fc_norm_hidden.weight": (1,),
        "mtp.norm.weight": (1,),
    },
    each={
        "mtp.layers.{layer}.input_layernorm.weight": (1,),
        "mtp.layers.{layer}.post_attention_layernorm.weight": (1,),
    },
    key="mtp_num_hidden_layers",
)

QWEN3_NEXT = replace(
    QWEN,
    name="qwen3_next",
    title="the MTP of Qwen3-Next",
    model_types=frozenset({"qwen3_next", "qwen3", "qwen3_moe"}),
    key="num_nextn_predict_layers",
)

QWEN4 = replace(
    QWEN,
    name="qwen4",
    title="the MTP of Qwen4",
    model_types=frozenset({"qwen4_exp"}),
    names=QWEN.names.replace("?P<block>", "?:"),
    once={
        "mtp.fc_embedding.weight": (1, 1),
        "mtp.fc_hidden.weight": (1, 1),
        "mtp.pre_fc_norm_embedding.weight": (1,),
    },
)

EXAONE = replace(
    QWEN3_NEXT,
    name="exaone",
    title="the MTP of EXAONE",
    model_types=frozenset({"exaone_moe", "exaone4_5"}),
    names=QWEN.names.replace("?P<block>", "?:"),
)

DEEPSEEK = MtpType(
    name="deepseek",
    title="the MTP of DeepSeek's type",
    model_types=frozenset(
        {
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "glm_ocr",
        }
    ),
    names=(
        rf"(?P<prefix>{PREFIX})layers\.(?P<layer>\d+)\."
        r"(?:(?:eh_proj|enorm|hnorm|shared_head|embed_tokens)\..+|(?P<block>.+))"
    ),
    each={
        "layers.{layer}.eh_proj.weight": (1, 2),
        "layers.{layer}.enorm.weight": (1,),
        "layers.{layer}.hnorm.weight": (1,),
        "layers.{layer}.shared_head.norm.weight": (1,),
    },
    after_body=True,
)

AFTER_BODY = replace(
    DEEPSEEK,
    name="after_body",
    title="an MTP in layers after the verifier's own",
    model_types=frozenset(
        {
            "bailing_hybrid",
            "bailing_moe_linear",
            "bailing_moe_v2",
            "bailing_moe_v3",
            "hy_v3",
            "hy_v4",
            "kimi_k3",
            "kimi_linear",
            "pangu_ultra_moe",
            "step3p5",
            "step3p7",
        }
    ),
    names=rf"(?P<prefix>{PREFIX})layers\.(?P<layer>\d+)\..+",
    each={
        "layers.{layer}.eh_proj.weight": (1, 2),
        "layers.{layer}.enorm.weight": (1,),
        "layers.{layer}.hnorm.weight": (1,),
    },
)

MIMO = MtpType(
    name="mimo",
    title="the MTP of MiMo",
    model_types=frozenset({"mimo"}),
    names=(
        r"model\.mtp_layers\.(?P<layer>\d+)\."
        r"(?:(?:input_proj|token_layernorm|hidden_layernorm|final_layernorm)\..+|(?P<block>.+))"
    ),
    each={
        "model.mtp_layers.{layer}.input_proj.weight": (1, 2),
        "model.mtp_layers.{layer}.token_layernorm.weight": (1,),
        "model.mtp_layers.{layer}.hidden_layernorm.weight": (1,),
        "model.mtp_layers.{layer}.final_layernorm.weight": (1,),
    },
)

MIMO_V2 = MtpType(
    name="mimo_v2",
    title="the MTP of MiMo-V2",
    model_types=frozenset({"mimo_v2", "mimo_v2_flash", "mimo_v2_omni"}),
    names=r"model\.mtp\.(?:layers\.(?P<layer>\d+)\..+|.+)",
    each={
        "model.mtp.layers.{layer}.pre_mlp_layernorm.weight": (1,),
        "model.mtp.layers.{layer}.eh_proj.weight": (1, 2),
        "model.mtp.layers.{layer}.enorm.weight": (1,),
        "model.mtp.layers.{layer}.hnorm.weight": (1,),
        "model.mtp.layers.{layer}.final_layernorm.weight": (1,),
    },
)

LONGCAT = MtpType(
    name="longcat",
    title="the MTP of LongCat-Flash",
    model_types=frozenset({"longcat_flash"}),
    names=r"model\.mtp\.(?:layers\.(?P<layer>\d+)\..+|.+)",
    once={"model.mtp.norm.weight": (1,)},
    each={
        "model.mtp.layers.{layer}.enorm.m.weight": (1,),
        "model.mtp.layers.{layer}.hnorm.m.weight": (1,),
        "model.mtp.layers.{layer}.eh_proj.weight": (1, 2),
    },
)

ERNIE = MtpType(
    name="ernie",
    title="the MTP of Ernie 4.5",
    model_types=frozenset({"ernie4_5_moe"}),
    names=(
        r"model\.mtp_(?:(?P<inside>block)|linear_proj|emb_norm|hidden_norm)\.(?P<layer>\d+)\."
        r"(?(inside)(?P<block>.+)|.+)"
    ),
    each={
        "model.mtp_linear_proj.{layer}.weight": (1, 2),
        "model.mtp_emb_norm.{layer}.weight": (1,),
        "model.mtp_hidden_norm.{layer}.weight": (1,),
    },
)

NEMOTRON_H = MtpType(
    name="nemotron_h",
    title="the MTP of Nemotron-H",
    model_types=frozenset({"nemotron_h", "nemotron_h_puzzle"}),
    names=r"mtp\.(?:layers\.(?P<layer>\d+)\..+|.+)",
    once={
        "mtp.layers.0.eh_proj.weight": (1, 2),
        "mtp.layers.0.enorm.weight": (1,),
        "mtp.layers.0.hnorm.weight": (1,),
    },
)

DEEPSEEK_V4 = MtpType(
    name="deepseek_v4",
    title="the MTP of DeepSeek-V4",
    model_types=frozenset({"deepseek_v4"}),
    names=r"mtp\.(?P<layer>\d+)\..+",
    each={
        "mtp.{layer}.e_proj.weight": (1, 1),
        "mtp.{layer}.h_proj.weight": (1, 1),
        "mtp.{layer}.enorm.weight": (1,),
        "mtp.{layer}.hnorm.weight": (1,),
    },
)

TYPES: tuple[MtpType, ...] = (
    QWEN,
    QWEN3_NEXT,
    QWEN4,
    EXAONE,
    AFTER_BODY,
    DEEPSEEK,
    MIMO,
    MIMO_V2,
    LONGCAT,
    ERNIE,
    NEMOTRON_H,
    DEEPSEEK_V4,
)
"""The types that can be cut and grafted. A verifier of an unknown ``model_type`` has the first one
whose marks it has."""

NAMED_ONLY = {
    "dots3_note": "dots3",
    "glm5_next": "GLM-5-next",
    "inkling": "Inkling",
    "interns2_mobius": "InternS2-Mobius",
    "iquest": "IQuest",
    "minimax_m3": "MiniMax-M3",
    "step5": "Step5",
    "step5_vl": "Step5-VL",
}
"""``model_type`` → name of models whose MTP engines know, and whose tensors are not known here."""

_DSPARK = re.compile(r"(?:model\.)?mtp\.\d+\.(?:main_proj|markov_head|confidence_head)\..+")


def find_dspark(names: Collection[str]) -> str | None:
    """A tensor that shows DSpark stages, which DeepSeek-V4 has below ``mtp.``; else ``None``."""
    return next((name for name in names if _DSPARK.fullmatch(name)), None)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a verifier's config.json."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


def model_types(config: Mapping[str, Any]) -> set[str]:
    """Every ``model_type`` that a config.json says, without a ``_text`` at the end."""
    said = (config.get("model_type"), language_config(config).get("model_type"))
    return {it.removesuffix("_text") for it in said if isinstance(it, str)}
