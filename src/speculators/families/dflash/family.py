"""The families of DFlash, DFlash 2 and DSpark drafts (z-lab/dflash, deepseek-ai/DeepSpec)."""

from dataclasses import replace

from speculators.families.dflash.config import (
    MASK_FILE,
    DFlash2Config,
    DFlashConfig,
    DSparkConfig,
)
from speculators.families.dflash.derive import (
    complete,
    converts_again,
    derive_dflash,
    derive_dflash2,
    derive_dspark,
)
from speculators.families.dflash.export import (
    DFLASH2_AS_CONVERTED,
    DFLASH2_TARGETS,
    DFLASH_AS_CONVERTED,
    DFLASH_TARGETS,
    DSPARK_AS_CONVERTED,
    DSPARK_TARGETS,
    export_config,
)
from speculators.families.dflash.options import OPTIONS
from speculators.families.dflash.tensors import (
    DFLASH2_FEATURES,
    DFLASH2_TENSORS,
    DFLASH_FEATURES,
    DFLASH_TENSORS,
    DSPARK_FEATURES,
    DSPARK_TENSORS,
    OLDER_PREFIXES,
    OMISSIONS,
)
from speculators.families.family import Card, Family, Names
from speculators.families.signature import Signature
from speculators.families.target import servings

__all__ = ["DFLASH", "DFLASH2", "DSPARK"]

BACKBONE = ("hidden_norm.weight", "layers.0.self_attn.q_norm.weight")
PARTS = ("fc.weight", *BACKBONE, "layers.0.self_attn.q_proj.weight")
OF_EAGLE3 = r"mask_hidden|midlayer\..*|layers\.0\.hidden_norm\.weight"


def _card(draft: str, tag: str) -> Card:
    return Card(draft, tags=(tag, "speculative-decoding", "speculators"))


DFLASH = Family(
    name="dflash",
    noun="a DFlash draft",
    signature=Signature(
        "dflash",
        "a DFlash draft",
        marks=r"hidden_norm\.weight",
        needs=BACKBONE,
        never=OF_EAGLE3,
        hints={"architectures": r"DFlash.*|Qwen3DSparkModel"},
        parts=PARTS,
        serving=servings(DFLASH_TARGETS),
    ),
    config=DFlashConfig,
    tensors=DFLASH_TENSORS,
    features=DFLASH_FEATURES,
    names=Names(prefixes=OLDER_PREFIXES),
    omissions=OMISSIONS,
    derive=derive_dflash,
    complete=complete,
    facts=DFlashConfig.facts,
    converts_again=converts_again,
    options=OPTIONS,
    companions=(MASK_FILE,),
    borrows=("embedding", "head"),
    model="speculators.models.dflash:DFlashSpeculator",
    reference="speculators.convert.references.dflash:DFlashReference",
    check="speculators.convert.checks.block:BlockCheck",
    card=_card("A DFlash draft", "dflash"),
    export_config=export_config,
    as_converted=DFLASH_AS_CONVERTED,
    targets=DFLASH_TARGETS,
    example=("z-lab/Qwen3-8B-DFlash-b16", "Qwen/Qwen3-8B"),
    unusual=("draft_vocabulary", "attention_bias"),
)

DFLASH2 = replace(
    DFLASH,
    name="dflash2",
    noun="a DFlash 2 draft",
    signature=replace(
        DFLASH.signature,
        kind="dflash2",
        title="a DFlash 2 draft",
        marks=r"candidate_selector\..*|layers\.\d+\.(attention|mlp)_conv\..*",
        hints={"architectures": r"DFlash2.*"},
        parts=(*PARTS, "candidate_selector.predecessor_codebook"),
        serving=servings(DFLASH2_TARGETS),
    ),
    config=DFlash2Config,
    tensors=DFLASH2_TENSORS,
    features=DFLASH2_FEATURES,
    names=Names(
        prefixes={
            # As upstream's own class saves them.
            f"candidate_selector.{name}_codebook.weight": f"candidate_selector.{name}_codebook"
            for name in ("predecessor", "successor")
        },
    ),
    derive=derive_dflash2,
    facts=DFlash2Config.facts,
    model="speculators.models.dflash:DFlash2Speculator",
    reference="speculators.convert.references.dflash:DFlash2Reference",
    card=_card("A DFlash 2 draft", "dflash2"),
    as_converted=DFLASH2_AS_CONVERTED,
    targets=DFLASH2_TARGETS,
    example=("z-lab/Qwen3.8-27B-DFlash2", "Qwen/Qwen3.8-27B"),
)

DSPARK = replace(
    DFLASH,
    name="dspark",
    noun="a DSpark draft",
    signature=replace(
        DFLASH.signature,
        kind="dspark",
        title="a DSpark draft",
        marks=r"(logit_head\.)?markov_head\..*|markov_w[12]\.weight",
        hints={"architectures": r".*DSpark.*"},
        parts=(*PARTS, "markov_head.markov_w1.weight"),
        serving=servings(DSPARK_TARGETS),
    ),
    config=DSparkConfig,
    tensors=DSPARK_TENSORS,
    features=DSPARK_FEATURES,
    omissions={r"verifier_(lm_head|norm)\.weight": OMISSIONS[r"verifier_(lm_head|norm)\.weight"]},
    derive=derive_dspark,
    facts=DSparkConfig.facts,
    model="speculators.models.dflash:DSparkSpeculator",
    reference="speculators.convert.references.dflash:DSparkReference",
    card=_card("A DSpark draft", "dspark"),
    as_converted=DSPARK_AS_CONVERTED,
    targets=DSPARK_TARGETS,
    example=("deepseek-ai/dspark_qwen3_8b_block7", "Qwen/Qwen3-8B"),
    unusual=(
        "gated_markov",
        "rnn_markov",
        "confidence_head",
        "draft_vocabulary",
        "attention_bias",
    ),
)
