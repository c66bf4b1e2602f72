"""The model card of a converted draft: the README.md that the Hub shows."""

import json
import re
import shlex
from collections.abc import Collection
from pathlib import PurePath

from speculators import HOMEPAGE, INSTALL
from speculators.families.family import Family
from speculators.families.serving import unserved
from speculators.format.config import SpeculatorConfig
from speculators.format.conversion import CONVERSION_FILE, ConversionRecord, RepositoryRecord

__all__ = ["ANY_DRAFT", "ANY_VERIFIER", "model_card", "names_hub_id"]

BORROWED = {"embedding": "embedding", "head": "output head"}
"""What a draft may take from its verifier → what the card calls it."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

ANY_DRAFT = "ORGANIZATION/DRAFT"
"""Stands for the draft's Hugging Face id where that is not known: before it is published."""

ANY_VERIFIER = "ORGANIZATION/VERIFIER"
"""Stands for the verifier's where it was a directory, whose path means nothing elsewhere."""

CARD = """\
---
{metadata}
---

# {title}

{draft} for {verifier}, in the speculators format. In speculative decoding the draft \
proposes the next tokens, and the verifier checks them in one pass, so that one pass of the large \
model gives several tokens. The draft works with this verifier alone: it {ties}.

| | |
| --- | --- |
| verifier | {verifier_in_table}{verifier_architectures} |
| layer | {layers} `{layer}`, hidden size {hidden}, vocabulary {vocabulary} |
| parameters | {parameters:,}, in {dtype} |
| has | {features} |
{placeholders}
## Getting speculators

{where}

```sh
{install}
```

(`pip install speculators` gets another project, which has the same name on PyPI.)

## Serving it

{serving}

## Using it from Python

It is loaded with its own class: transformers' `AutoModel` does not know drafts.

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

SERVING = """\
With [vLLM](https://docs.vllm.ai), and speculators installed beside it:

```sh
{with_named}vllm serve {verifier_in_shell} \\
    --speculative-config {speculative_config}
```"""

WITH_NAMED = """\
# With the verifier that the draft's config names:
vllm serve {name_in_shell}

# To choose it, and how many tokens are drafted:
"""

UNSERVED = "[vLLM](https://docs.vllm.ai) does not serve it as it is: {why}."

PROVENANCE = """
## Where it comes from

Converted by speculators {version} from {source}. Its tensors are those of the source, {bytes}. \
{proof} `{conversion_file}` tells where each tensor comes from, and what was left out and why.
"""


def names_hub_id(name: str) -> bool:
    """Whether the name of a verifier or source is a Hugging Face id rather than a path."""
    return HUB_ID.fullmatch(name) is not None


def model_card(
    name: str | None,
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

    The card states only what the files state: no licence, no training data, no opinion. Its
    commands are for somebody who finds it on the Hub: models have their Hugging Face ids there, or
    ``ANY_DRAFT`` and ``ANY_VERIFIER`` where these are not known, with a sentence that says so.

    Args:
        name: the Hugging Face id that the draft is loaded from; ``None`` if it has none yet.
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
    reference = config.speculators_config.verifier
    named = reference.name_or_path or ""
    verifier = named if names_hub_id(named) else None
    metadata = {
        **({"base_model": verifier} if verifier else {}),
        "library_name": "speculators",
        "tags": sorted({*family.card.tags, *tags}),
    }
    layer = config.transformer_layer_config
    model_module, _, model_class = family.model.partition(":")
    borrowed = [it for it in family.borrows if it not in features]
    draft = family.card.draft.removeprefix("An ").removeprefix("A ")
    title = f"{draft} for {PurePath(verifier).name}" if verifier else draft
    architecture = next(iter(reference.architectures), "language model")
    card = CARD.format(
        draft=family.card.draft,
        install=INSTALL,
        where="In an environment of its own:" if HOMEPAGE else "In a copy of its repository:",
        model_module=model_module,
        model_class=model_class,
        # JSON is YAML too.
        metadata="\n".join(f"{key}: {json.dumps(it)}" for key, it in metadata.items()),
        title=PurePath(name).name if name else title,
        verifier=f"`{verifier}`" if verifier else f"a {architecture}",
        verifier_in_table=f"`{verifier}`, " if verifier else "",
        placeholders=_say_what_is_not_known(name, verifier),
        serving=_serving(name, verifier, family, config, frozenset(features)),
        name_in_python=json.dumps(name or ANY_DRAFT),
        verifier_in_python=json.dumps(verifier or ANY_VERIFIER),
        verifier_architectures=", ".join(f"`{it}`" for it in reference.architectures)
        or "not known",
        ties=_ties(borrowed),
        layers="one" if config.layers == 1 else str(config.layers),
        layer=f"{layer.model_type.capitalize()}DecoderLayer",  # transformers' name of it
        hidden=layer.hidden_size,
        vocabulary=layer.vocab_size,
        parameters=parameters,
        dtype=config.torch_dtype or "the type of its tensors",
        features=", ".join(family.features[it] for it in family.features if it in features)
        or "nothing beyond what every draft of its kind has",
    )
    if evaluation:
        card += f"\n## How well it drafts\n\n{evaluation.strip()}\n"
    if record:
        card += _provenance(record)
    return card


def _serving(
    name: str | None,
    verifier: str | None,
    family: Family,
    config: SpeculatorConfig,
    features: frozenset[str],
) -> str:
    """The commands that serve it with vLLM, or why these do not work, and what does."""
    if why := unserved(family, config, features):
        return UNSERVED.format(why=why)
    assert family.as_converted is not None
    proposal = config.speculators_config.proposal_methods[0]
    wanted = dict(family.as_converted.serving_of(config).settings)
    settings = {
        "method": wanted.pop("method"),
        "model": name or ANY_DRAFT,
        "num_speculative_tokens": proposal.speculative_tokens,
        **wanted,
    }
    return SERVING.format(
        with_named=WITH_NAMED.format(name_in_shell=shlex.quote(name or ANY_DRAFT))
        if verifier
        else "",
        verifier_in_shell=shlex.quote(verifier or ANY_VERIFIER),
        speculative_config=shlex.quote(json.dumps(settings)),
    )


def _ties(borrowed: Collection[str]) -> str:
    """What a draft takes from its verifier, as it follows "it"."""
    if not borrowed:
        return "reads the verifier's hidden states"
    matrices = " and ".join(BORROWED[it] for it in borrowed)
    return f"uses the verifier's {matrices}, and has none of its own"


def _say_what_is_not_known(name: str | None, verifier: str | None) -> str:
    sentences = []
    if name is None:
        sentences.append(f"`{ANY_DRAFT}` stands for the Hugging Face id of this draft")
    if verifier is None:
        sentences.append(
            f"`{ANY_VERIFIER}` stands for the id of its verifier, which was a directory where the "
            "draft was converted"
        )
    return f"\nBelow, {', and '.join(sentences)}.\n" if sentences else ""


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
    if not names_hub_id(source.name):
        return "a checkpoint in a directory"
    commit = f" at the commit {source.revision}" if source.revision else ""
    return f"`{source.name}`{commit}"
