"""The model card: what it says agrees with the files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import dflash
from helpers import GOLDEN_NAMES, config_of, stored_tensors
from speculators import INSTALL
from speculators.families.card import model_card, names_hub_id
from speculators.families.converted import open_converted, parse_config
from speculators.families.dflash import DFLASH
from speculators.families.eagle import EAGLE
from speculators.format.config import SpeculatorConfig
from speculators.format.conversion import ConversionRecord, parse_conversion

VERIFIER = "org/verifier-8b"


def config_for(directory: Path, verifier: str | None = VERIFIER) -> SpeculatorConfig:
    config = config_of(directory)
    config["speculators_config"]["verifier"]["name_or_path"] = verifier
    _, parsed = parse_config(config, str(directory))
    return parsed


def record_of(directory: Path, **changes: Any) -> ConversionRecord:
    record = json.loads((directory / "conversion.json").read_text())
    return parse_conversion(record | changes, str(directory))


def card_of(
    directory: Path,
    verifier: str | None = VERIFIER,
    *,
    name: str | None = "org/draft",
    **options: Any,
) -> str:
    tensors = stored_tensors(directory)
    return model_card(
        name,
        EAGLE,
        config_for(directory, verifier),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        features=EAGLE.features_of(tensors),
        **options,
    )


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([a-z]+) \| (.*) \|$", card, re.MULTILINE))


def test_the_hubs_client_understands_the_metadata(converted: dict[str, Path]) -> None:
    for name in GOLDEN_NAMES:
        metadata: Any = ModelCard(card_of(converted[name], tags=["mine"])).data
        assert metadata.to_dict() == {
            "base_model": VERIFIER,
            "library_name": "speculators",
            "tags": ["eagle", "mine", "speculative-decoding", "speculators"],
        }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama31_gqa_nobias", "an embedding of its own"),
        ("qwen2_qkv_bias", "an embedding of its own, a bias on fc, biases on q, k and v"),
        ("ttt_layernorms", "an embedding of its own, extra layernorms"),
    ],
)
def test_what_the_draft_is(converted: dict[str, Path], name: str, expected: str) -> None:
    directory = converted[name]
    sizes = config_of(directory)["transformer_layer_config"]
    layer = config_of(directory)["transformer_layer_architecture"]
    parameters = sum(tensor.numel() for tensor in stored_tensors(directory).values())
    assert rows(card_of(directory)) == {
        "verifier": f"`{VERIFIER}`, `LlamaForCausalLM`",
        "layer": f"one `{layer}`, hidden size {sizes['hidden_size']}, "
        f"vocabulary {sizes['vocab_size']}",
        "parameters": f"{parameters:,}, in float32",
        "has": expected,
    }


def test_what_it_takes_from_its_verifier(converted: dict[str, Path]) -> None:
    config = config_for(converted["llama31_gqa_nobias"])
    with_own, without = (
        model_card("org/draft", EAGLE, config, parameters=1, features=features)
        for features in (["embedding"], [])
    )
    assert "uses the verifier's output head, and has none of its own" in with_own
    assert "uses the verifier's embedding and output head, and has none of its own" in without
    assert rows(without)["has"] == "nothing beyond what every draft of its kind has"


def test_a_draft_that_takes_no_matrix(tmp_path: Path) -> None:
    out = dflash.converted(
        dflash.write_draft(tmp_path / "source", dflash.native(), dflash.with_own_matrices),
        tmp_path / "out",
    )
    draft = open_converted(out)
    card = model_card("org/draft", DFLASH, draft.config, parameters=1, features=draft.features)
    assert "it reads the verifier's hidden states." in card
    assert '"method": "dflash"' in card
    assert re.match(r"\w+ `Qwen3DecoderLayer`, ", rows(card)["layer"])


@pytest.mark.parametrize(
    ("config", "edit", "export"),
    [
        (dflash.native(sample_from_anchor=True), lambda tensors: None, "--to vllm"),
        (dflash.deepspec(markov_head_type="rnn"), dflash.with_markov("rnn"), "--to sglang"),
    ],
)
def test_what_vllm_does_not_serve_in_the_format(
    tmp_path: Path, config: dict[str, Any], edit: dflash.Edit, export: str
) -> None:
    """The card says what to do instead, and shows no command that would fail."""
    out = dflash.converted(dflash.write_draft(tmp_path / "source", config, edit), tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "vllm serve" not in card
    (section,) = re.findall(r"## Serving it\n\n(.*)\n\n## Using", card)
    assert "does not serve it as it is: " in section
    assert export in section


def test_how_to_serve_it(converted: dict[str, Path]) -> None:
    card = card_of(converted["llama31_gqa_nobias"])
    assert "\nvllm serve org/draft\n" in card
    (served,) = re.findall(r"\nvllm serve (\S+) \\\n    --speculative-config '(.*)'\n", card)
    assert served[0] == VERIFIER
    assert json.loads(served[1]) == {
        "method": "eagle",
        "model": "org/draft",
        "num_speculative_tokens": 5,
    }
    assert "stands for" not in card


def test_how_to_get_the_package(converted: dict[str, Path]) -> None:
    """The constant tells it, in one place; installing by name would get another project."""
    card = card_of(converted["llama31_gqa_nobias"])
    assert f"\n```sh\n{INSTALL}\n```\n" in card
    assert "\npip install speculators" not in card


@pytest.mark.parametrize("verifier", ["/home/me/my models/verifier 8b", None])
def test_a_path_is_nobody_elses(converted: dict[str, Path], verifier: str | None) -> None:
    """Names that are not known on the Hub have placeholders in every command, and a sentence."""
    directory = converted["llama31_gqa_nobias"]
    card = card_of(directory, verifier, name=None, record=record_of(directory))
    assert "/home" not in card
    assert "verifier 8b" not in card
    assert str(directory.parent) not in card
    assert directory.name not in card
    assert "base_model" not in card
    assert "`ORGANIZATION/DRAFT` stands for the Hugging Face id of this draft, and" in card
    assert "`ORGANIZATION/VERIFIER` stands for the id of its verifier" in card
    assert re.findall(r"vllm serve (\S+)", card) == ["ORGANIZATION/VERIFIER"]
    assert {*re.findall(r'from_pretrained\("(.*?)"', card)} == {
        "ORGANIZATION/DRAFT",
        "ORGANIZATION/VERIFIER",
    }
    assert "\n# EAGLE draft\n" in card
    assert rows(card)["verifier"] == "`LlamaForCausalLM`"
    assert "from a checkpoint in a directory." in card


def test_provenance(converted: dict[str, Path]) -> None:
    directory = converted["llama31_gqa_nobias"]
    source = {"name": "org/eagle", "revision": "0" * 40, "files": {}}
    assert "Where it comes from" not in card_of(directory)

    card = card_of(directory, record=record_of(directory, source=source))
    assert f"from `org/eagle` at the commit {'0' * 40}. Its tensors are those of" in card
    assert "the source, byte for byte. That was checked, and that the model computes" in card
    assert card.endswith("what was left out and why.\n")

    unchecked = record_of(
        directory,
        dtype="bfloat16",
        validated=False,
        discrepancies=["num_hidden_layers is 2, and there is one layer"],
    )
    card = card_of(directory, record=unchecked)
    assert "those of the source, rounded to bfloat16. None of this was checked." in card
    assert card.endswith("\n- num_hidden_layers is 2, and there is one layer.\n")


def test_no_licence_is_invented(converted: dict[str, Path]) -> None:
    directory = converted["llama31_gqa_nobias"]
    card = card_of(directory, record=record_of(directory))
    assert not re.search("licen[cs]e", card, re.IGNORECASE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model-1.5", True),
        ("gpt2", True),
        ("/srv/model", False),
        ("./model", False),
        ("../model", False),
        ("~/model", False),
        ("a/b/c", False),
        ("my model", False),
        ("", False),
    ],
)
def test_what_is_a_hub_id(name: str, expected: bool) -> None:
    assert names_hub_id(name) == expected
