"""The model card of a converted draft: the README.md that the Hub shows."""

import json
import re
import shlex
from collections.abc import Collection
from pathlib import PurePath

from speculators import HOMEPAGE
from speculators.families.family import Family
from speculators.format.config import SpeculatorConfig
from speculators.format.conversion import CONVERSION_FILE, ConversionRecord, RepositoryRecord

__all__ = ["model_card", "names_hub_id"]

BORROWED = {"embedding": "embedding", "head": "output head"}
"""What a draft may take from its verifier → what the card calls it."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

CARD = """\
---
{metadata}
---

# {title}

{draft} for `{verifier}`, in the speculators format. In speculative decoding the draft \
proposes the next tokens, and the verifier checks them in one pass, so that one pass of the large \
model gives several tokens. The draft works with this verifier alone: it {ties}.

| | |
| --- | --- |
| verifier | `{verifier}` ({verifier_architectures}) |
| layer | {layers} `{layer}`, hidden size {hidden}, vocabulary {vocabulary} |
| parameters | {parameters:,}, in {dtype} |
| has | {features} |

## Serving it

With [vLLM](https://docs.vllm.ai), and speculators installed beside it from {repository} \
(`pip install .`; the PyPI project called speculators is another one):

```sh
vllm serve {name_in_shell}
```

That takes the verifier from the draft's config. To choose it, and how many tokens are drafted:

```sh
vllm serve {verifier_in_shell} \\
    --speculative-config {speculative_config}
```

## Using it from Python

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from {model_module} import {model_class}

tokenizer = AutoTokenizer.from_pretrained({verifier_in_python})
verifier = AutoModelForCausalLM.from_pretrained({verifier_in_python}, dtype="auto")
draft = {model_class}.from_pretrained({name_in_python}, verifier=verifier)

prompt = tokenizer("The capital of France is", return_tensors="pt")
output = draft.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(output[0]))
```
"""

PROVENANCE = """
## Where it comes from

Converted by speculators {version} from {source}. Its tensors are those of the source, {bytes}. \
{proof} `{conversion_file}` tells where each tensor comes from, and what was left out and why.
"""


def names_hub_id(name: str) -> bool:
    """Whether the name of a verifier or source is a Hugging Face id rather than a path."""
    return HUB_ID.fullmatch(name) is not None


def model_card(
    name: str,
    family: Family,
    config: SpeculatorConfig,
    *,
    parameters: int,
    features: Collection[str],
    record: ConversionRecord | None = None,
    evaluation: str | None = None,
    tags: Collection[str] = (),
) -> str:
    """Write the model card of a converted draft.

    The card states only what the files state: no licence, no training data, no opinion.

    Args:
        name: the Hugging Face id or path that the draft is loaded from.
        family: the draft's.
        config: the draft's.
        parameters: the number of parameters of all its tensors.
        features: the features that its tensors show.
        record: its conversion.json, if it has one.
        evaluation: a section about how well it drafts, in Markdown.
        tags: more tags for the Hub, besides those of its family.

    Returns:
        Markdown that begins with metadata in YAML.

    """
    from huggingface_hub import ModelCardData

    reference = config.speculators_config.verifier
    verifier = _shown(reference.name_or_path or "VERIFIER")
    metadata = ModelCardData(
        base_model=reference.name_or_path if names_hub_id(reference.name_or_path or "") else None,
        library_name="speculators",
        tags=sorted({*family.card.tags, *tags}),
    )
    proposal = config.speculators_config.proposal_methods[0]
    speculative_config = {
        "method": family.card.method,
        "model": name,
        "num_speculative_tokens": proposal.speculative_tokens,
    }
    layer = config.transformer_layer_config
    model_module, _, model_class = family.model.partition(":")
    borrowed = [it for it in family.borrows if it not in features]
    card = CARD.format(
        draft=family.card.draft,
        repository=f"[its repository]({HOMEPAGE})" if HOMEPAGE else "its repository",
        model_module=model_module,
        model_class=model_class,
        metadata=metadata.to_yaml(),
        title=PurePath(name).name,
        verifier=verifier,
        name_in_shell=shlex.quote(name),
        verifier_in_shell=shlex.quote(verifier),
        name_in_python=json.dumps(name),
        verifier_in_python=json.dumps(verifier),
        verifier_architectures=", ".join(f"`{it}`" for it in reference.architectures),
        ties=_ties(borrowed),
        layers="one" if config.layers == 1 else str(config.layers),
        layer=config.architectures[-1],
        hidden=layer.hidden_size,
        vocabulary=layer.vocab_size,
        parameters=parameters,
        dtype=config.torch_dtype or "the type of its tensors",
        features=", ".join(family.features[it] for it in family.features if it in features)
        or "nothing beyond what every draft of its kind has",
        speculative_config=shlex.quote(json.dumps(speculative_config)),
    )
    if evaluation:
        card += f"\n## How well it drafts\n\n{evaluation.strip()}\n"
    if record:
        card += _provenance(record)
    return card


def _ties(borrowed: Collection[str]) -> str:
    """What a draft takes from its verifier, as it follows "it"."""
    if not borrowed:
        return "reads the verifier's hidden states"
    matrices = " and ".join(BORROWED[it] for it in borrowed)
    return f"uses the verifier's {matrices}, and has none of its own"


def _provenance(record: ConversionRecord) -> str:
    text = PROVENANCE.format(
        version=record.speculators_version,
        source=_source(record.source),
        bytes=f"rounded to {record.dtype}" if record.dtype else "byte for byte",
        proof=(
            "That was checked, and that the model computes with them what the source does."
            if record.validated
            else "None of this was checked."
        ),
        conversion_file=CONVERSION_FILE,
    )
    if remarks := record.unchecked + record.discrepancies:
        text += "\n" + "".join(f"- {remark.rstrip('.')}.\n" for remark in remarks)
    return text


def _source(source: RepositoryRecord) -> str:
    commit = f" at the commit {source.revision}" if source.revision else ""
    return f"`{_shown(source.name)}`{commit}"


def _shown(name: str) -> str:
    """A Hugging Face id unchanged; of a path, which means nothing elsewhere, its last part."""
    return name if names_hub_id(name) else PurePath(name).name
