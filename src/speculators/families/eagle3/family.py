"""The family of EAGLE-3, EAGLE-3.1 and P-EAGLE drafts (SafeAILab/EAGLE, eagle/model/cnets.py)."""

from speculators.families.eagle3.config import Eagle3Config
from speculators.families.eagle3.derive import complete, converts_again, derive
from speculators.families.eagle3.export import AS_CONVERTED, TARGETS, export_config
from speculators.families.eagle3.options import OPTIONS
from speculators.families.eagle3.tensors import FEATURES, OLDER_PREFIXES, OMISSIONS, TENSORS
from speculators.families.family import Card, Family, Names
from speculators.families.signature import Signature
from speculators.families.target import servings

__all__ = ["EAGLE3"]

EAGLE3 = Family(
    name="eagle3",
    noun="an EAGLE-3 or P-EAGLE draft",
    model_types=("eagle3", "peagle"),
    signature=Signature(
        "eagle3",
        "an EAGLE-3 draft",
        marks=r"d2t|t2d|midlayer\..*|layers\.0\.hidden_norm\.weight",
        fc_inputs=3,
        attention_inputs=2,
        hints={"architectures": r".*Eagle3.*|PEagleDraftModel"},
        parts=("fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight"),
        serving=servings(TARGETS),
    ),
    config=Eagle3Config,
    tensors=TENSORS,
    features=FEATURES,
    names=Names(prefixes=OLDER_PREFIXES),
    omissions=OMISSIONS,
    derive=derive,
    complete=complete,
    facts=Eagle3Config.facts,
    converts_again=converts_again,
    options=OPTIONS,
    borrows=("embedding",),
    model="speculators.models.eagle3:Eagle3Speculator",
    reference="speculators.convert.references.eagle3:Eagle3Reference",
    card=Card(
        draft="An EAGLE-3 draft",
        tags=("eagle3", "speculative-decoding", "speculators"),
    ),
    export_config=export_config,
    as_converted=AS_CONVERTED,
    targets=TARGETS,
    example=("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    unusual=("mask_hidden", "fc_norm", "input_norm", "fc_bias", "attention_bias", "mlp_bias"),
)
