"""`speculators inspect`: what it finds in every kind of checkpoint, and how it prints that."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    CommandLine,
    Tensors,
    run_process,
    save_quietly,
    source_tensors,
    tiny_llama,
    write_checkpoint,
    write_shards,
)
from speculators.inspection.findings import Finding

EXPECTED = Path(__file__).parent / "expected"


def finding(run: CommandLine, *arguments: str | Path) -> dict[str, Any]:
    """What `inspect --json` prints, checked against its schema."""
    done = run("inspect", *arguments, "--json")
    assert done.stderr == ""
    assert done.status == 0
    found: dict[str, Any] = json.loads(done.stdout)
    Finding.model_validate(found)
    return found


def replaced(**tensors: torch.Tensor) -> Callable[[Tensors], None]:
    """An edit that replaces all tensors; names are given with ``__`` for dots."""

    def edit(there: Tensors) -> None:
        there.clear()
        there.update({name.replace("__", "."): it.clone() for name, it in tensors.items()})

    return edit


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


# Drafts that are converted


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_json_of_every_golden_checkpoint(
    monkeypatch: pytest.MonkeyPatch, speculators: CommandLine, name: str
) -> None:
    """Update the expected files with `cd tests/golden; speculators inspect NAME --json`."""
    monkeypatch.chdir(GOLDEN)
    assert finding(speculators, name) == json.loads((EXPECTED / f"{name}.json").read_text())


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_what_it_promises_of_a_conversion_is_what_a_conversion_does(
    converted: dict[str, Path], speculators: CommandLine, name: str
) -> None:
    found = finding(speculators, GOLDEN / name)
    config = json.loads((converted[name] / "config.json").read_text())
    made = finding(speculators, converted[name])
    assert found["conversion"]["layer_config"] == config["transformer_layer_config"]
    assert {tensor["target"] for tensor in found["tensors"]} == {
        tensor["name"] for tensor in made["tensors"]
    }
    assert {feature for feature, names in found["features"].items() if names} == {
        feature for feature, names in made["features"].items() if names
    }
    assert made["features"]["layernorms"] == [] or config["layernorms"]
    assert bool(made["features"]["fusion_bias"]) == config["fusion_bias"]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_it_counts_what_is_there(speculators: CommandLine, name: str) -> None:
    found = finding(speculators, GOLDEN / name)
    tensors = source_tensors(name)
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in found["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_containers_make_no_difference(
    tmp_path: Path, speculators: CommandLine, container: str
) -> None:
    source = write_checkpoint(tmp_path / "source", container=container)
    found = finding(speculators, source)
    expected = json.loads((EXPECTED / f"{PLAIN}.json").read_text())
    assert {tensor["file"] for tensor in found["tensors"]} == {container}
    for key in ("kind", "title", "evidence", "sizes", "dtypes", "verifier", "features"):
        assert found[key] == expected[key]
    assert finding(speculators, source / container)["tensors"] == found["tensors"]


def test_shards(tmp_path: Path, speculators: CommandLine) -> None:
    source = write_checkpoint(tmp_path / "source")
    tensors = source_tensors()
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    write_shards(source, {file: {n: tensors[n] for n in part} for file, part in halves.items()})
    found = finding(speculators, source)
    assert {t["name"]: t["file"] for t in found["tensors"]} == {
        name: file for file, part in halves.items() for name in part
    }


def test_what_a_conversion_leaves_out_is_told(tmp_path: Path, speculators: CommandLine) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=added("model.lm_head.weight", torch.zeros(320, 64))
    )
    by_name = {tensor["name"]: tensor for tensor in finding(speculators, source)["tensors"]}
    assert by_name["model.lm_head.weight"]["left_out"] == "logits come from the verifier's own head"
    assert by_name["model.lm_head.weight"]["target"] is None


def test_without_an_embedding(tmp_path: Path, speculators: CommandLine) -> None:
    source = write_checkpoint(tmp_path / "source", edit=lambda t: t.pop("embed_tokens.weight"))
    found = finding(speculators, source)
    assert found["features"]["embedding"] == []
    assert found["verifier"] == {"hidden_size": 64, "vocab_size": 320, "name": None}
    assert any("the verifier's is used" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("HASS-LLaMA3-Instruct-8B", True),
        ("my_hass_draft", True),
        ("chassis", False),
        ("EAGLE-hassle", False),
    ],
)
def test_hass_cannot_be_told_but_by_a_name(
    tmp_path: Path, speculators: CommandLine, name: str, suggested: bool
) -> None:
    source = write_checkpoint(tmp_path / "hass" / name)
    found = finding(speculators, source)
    assert found["kind"] == "eagle"
    assert "cannot tell EAGLE-1, EAGLE-2 and HASS apart" in found["notes"][0]
    assert (f"the name {name} suggests HASS" in found["notes"][0]) == suggested


# Drafts that are converted already


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_converted_draft(
    converted: dict[str, Path], verifiers: dict[str, Path], speculators: CommandLine, name: str
) -> None:
    found = finding(speculators, converted[name])
    assert found["kind"] == "speculators"
    assert found["title"].startswith("an EAGLE-1 or EAGLE-2 draft in the speculators format")
    assert found["layout"] == "current"
    assert found["verifier"] == {
        "hidden_size": 64,
        "vocab_size": 320,
        "name": str(verifiers[name]),
    }
    assert found["converted_from"] == {"name": str(GOLDEN / name), "revision": None}
    assert not found["conversion"]["possible"]
    assert "converted already" in found["conversion"]["why_not"]


OLD_NAMES = {
    "fc.": "fusion_fc.",
    "hidden_layernorm.": "transformer.input_layernorm.",
    "layers.0.": "transformer.",
    "post_embedding_layernorm.": "embedding_layernorm.",
}


def test_the_layout_of_earlier_versions(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = next((o + name[len(n) :] for n, o in OLD_NAMES.items() if name.startswith(n)), "")
            tensor = tensors.pop(name)
            if name != "embed_tokens.weight":
                tensors[old or name] = tensor

    edited = write_checkpoint(tmp_path / "old", name="llama31_gqa_nobias", edit=rename)
    shutil.copy(converted["llama31_gqa_nobias"] / "config.json", edited)
    found = finding(speculators, edited)
    assert found["layout"] == "0.1.0 to 0.3.0"
    assert {tensor["name"]: tensor["target"] for tensor in found["tensors"]}[
        "fusion_fc.weight"
    ] == "fc.weight"
    assert found["notes"] == []


def test_a_converted_draft_that_is_damaged(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    damaged = write_checkpoint(tmp_path / "draft", edit=lambda t: t.pop("fc.weight"))
    shutil.copy(converted[PLAIN] / "config.json", damaged)
    found = finding(speculators, damaged)
    assert found["kind"] == "speculators"
    assert re.search(r"cannot be used: .*lacks fc\.weight", found["notes"][0])


def test_a_record_that_is_damaged(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    draft = shutil.copytree(converted[PLAIN], tmp_path / "draft")
    (draft / "conversion.json").write_text("{}")
    found = finding(speculators, draft)
    assert found["converted_from"] is None
    assert "not known: conversion.json, key speculators_version" in found["notes"][0]


def test_a_type_that_this_version_does_not_read(tmp_path: Path, speculators: CommandLine) -> None:
    source = write_checkpoint(tmp_path / "s", config={"speculators_model_type": "newer"})
    found = finding(speculators, source)
    assert found["kind"] == "speculators"
    assert "to the type newer, which this version does not read" in found["conversion"]["why_not"]


# Other kinds

ONE = torch.ones(4, 4)
KINDS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str, str]] = {
    "EAGLE-3": (added("d2t", torch.arange(10)), {}, "eagle3", "d2t"),
    "EAGLE-3 by its fc": (
        added("fc.weight", torch.zeros(64, 192)),
        {},
        "eagle3",
        r"fc\.weight \(64, 192\) takes 3 hidden sizes",
    ),
    "Medusa": (
        replaced(**{"0__0__linear__weight": ONE, "0__0__linear__bias": ONE, "0__1__weight": ONE}),
        {},
        "medusa",
        r"0\.0\.linear\.weight",
    ),
    "Medusa as vLLM has it": (
        replaced(blocks__0__layers__0__weight=ONE, lm_heads__0__weight=ONE),
        {},
        "medusa",
        r"blocks\.0\.layers\.0\.weight",
    ),
    "MLP speculator": (
        replaced(speculator__emb__0__weight=ONE, speculator__proj__0__weight=ONE),
        {"model_type": "mlp_speculator"},
        "mlp-speculator",
        "config.json says model_type mlp_speculator",
    ),
    "GPT-2": (
        replaced(transformer__wte__weight=ONE, transformer__h__0__ln_1__weight=ONE),
        {},
        "language-model",
        r"transformer\.h\.0\.ln_1\.weight",
    ),
    "several layers": (
        added("layers.1.mlp.up_proj.weight", torch.ones(176, 64)),
        {},
        "several-layers",
        r"layers\.1\.mlp\.up_proj\.weight",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_other_kinds(tmp_path: Path, speculators: CommandLine, case: str) -> None:
    edit, config, kind, evidence = KINDS[case]
    source = write_checkpoint(tmp_path / "source", edit=edit, config=config)
    found = finding(speculators, source)
    assert found["kind"] == kind
    assert any(re.search(evidence, clause) for clause in found["evidence"]), found["evidence"]
    assert not found["conversion"]["possible"]
    refused = speculators("convert", "auto", source, tmp_path / "out", source)
    assert refused.errors == [found["conversion"]["why_not"]]


def test_a_whole_language_model(tmp_path: Path, speculators: CommandLine) -> None:
    found = finding(speculators, save_quietly(tiny_llama(num_hidden_layers=2), tmp_path / "llama"))
    assert found["kind"] == "language-model"
    assert found["verifier"] == {"hidden_size": 64, "vocab_size": 320, "name": None}
    assert found["sizes"]["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("edit", "config", "clause"),
    [
        (added("fc.qweight", torch.ones(1)), {}, "it has fc.qweight"),
        (lambda _: None, {"quantization_config": {}}, None),
        (lambda _: None, {"quantization_config": {"bits": 4}}, None),
    ],
)
def test_quantization_is_told_beside_the_kind(
    tmp_path: Path,
    speculators: CommandLine,
    edit: Callable[[Tensors], object],
    config: dict[str, Any],
    clause: str | None,
) -> None:
    found = finding(speculators, write_checkpoint(tmp_path / "source", edit=edit, config=config))
    assert found["kind"] == "eagle"
    assert (clause is None) == (found["quantized"] == []) == found["conversion"]["possible"]
    assert clause is None or clause in found["quantized"][0]


def test_a_draft_that_lacks_something_is_still_a_draft(
    tmp_path: Path, speculators: CommandLine
) -> None:
    source = write_checkpoint(tmp_path / "s", edit=lambda t: t.pop("layers.0.mlp.up_proj.weight"))
    found = finding(speculators, source)
    assert found["kind"] == "eagle"
    assert "lacks layers.0.mlp.up_proj.weight" in found["conversion"]["why_not"]
    assert all(tensor["target"] is None for tensor in found["tensors"])


def test_without_weights_the_config_suggests_a_kind(
    tmp_path: Path, speculators: CommandLine
) -> None:
    """Medusa heads are published as medusa_lm_head.pt, which is not a name that is looked for."""
    source = write_checkpoint(tmp_path / "source", config={"medusa_num_heads": 5})
    (source / "model.safetensors").unlink()
    found = finding(speculators, source)
    assert found["kind"] == "medusa"
    assert found["tensors"] == []
    assert "judged by its config.json alone" in found["notes"][0]


def test_without_weights_nothing_is_said_of_what_they_would_show(
    tmp_path: Path, speculators: CommandLine
) -> None:
    source = write_checkpoint(tmp_path / "source", config={"num_hidden_layers": 1})
    (source / "model.safetensors").unlink()
    found = finding(speculators, source)
    assert found["kind"] == "eagle"
    assert found["features"] is None
    assert not found["conversion"]["possible"]
    assert found["conversion"]["why_not"] == (
        f"{source} has no weights that can be read, and they decide."
    )
    assert "\nwithout" not in speculators("inspect", source).stdout


def test_of_a_converted_draft_without_weights_neither(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    out = shutil.copytree(converted[PLAIN], tmp_path / "out")
    (out / "model.safetensors").unlink()
    found = finding(speculators, out)
    assert (found["kind"], found["features"], found["layout"]) == ("speculators", None, None)


# What is unknown


def prefixed(tensors: Tensors) -> None:
    """All but one, so that the prefix is not one that all names share."""
    for name in list(tensors):
        tensors[f"encoder.{name}"] = tensors.pop(name)
    tensors["bridge.weight"] = torch.ones(4)


def with_a_norm_and_another_fc(tensors: Tensors) -> None:
    tensors["layers.0.input_layernorm.weight"] = torch.ones(64)
    tensors["fc.weight"] = torch.ones(64, 64)


UNKNOWN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "another prefix": (
        prefixed,
        r"EAGLE-1 or EAGLE-2 draft it has 9 of 9 tensors, with encoder\. before their names",
    ),
    "a norm too many": (
        with_a_norm_and_another_fc,
        r"but also has layers\.0\.input_layernorm\.weight, which that never has",
    ),
    "a norm and nothing else": (
        replaced(norm__weight=torch.ones(4)),
        r"of a whole language model it has 1 of 3 tensors, but lacks embed_tokens\.weight",
    ),
    "something else": (replaced(conv__weight=ONE), r"it has conv\.weight; "),
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_an_unknown_checkpoint_is_an_error_that_says_what_is_near(
    tmp_path: Path, speculators: CommandLine, case: str, options: tuple[str, ...]
) -> None:
    edit, pattern = UNKNOWN[case]
    source = write_checkpoint(tmp_path / "source", edit=edit)
    run = speculators("inspect", source, *options)
    assert run.status == 1
    assert len(run.errors) == 1
    assert re.search(pattern, run.errors[0]), run.errors[0]
    refused = speculators("convert", "eagle", source, tmp_path / "out", source)
    assert refused.errors == run.errors
    if options:
        assert json.loads(run.stdout)["kind"] == "unknown"
    else:
        assert "a checkpoint of no known kind" in run.stdout


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda source: (source / "config.json").unlink(), r"has no config\.json"),
        (lambda source: (source / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda source: (source / "model.safetensors").write_bytes(b"\xff" * 100),
            r"model\.safetensors is ",
        ),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, speculators: CommandLine, spoil: Callable[[Path], object], pattern: str
) -> None:
    source = write_checkpoint(tmp_path / "source")
    spoil(source)
    run = speculators("inspect", source)
    assert (run.status, run.stdout) == (1, "")
    assert len(run.errors) == 1
    assert re.search(pattern, run.errors[0])


# How it is printed


def test_the_text_in_a_pipe_is_the_same_whatever_the_window_is(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / ("long " * 30), name="ttt_layernorms")
    runs = [
        run_process("inspect", source),
        run_process("inspect", source, COLUMNS="40"),
        run_process("inspect", source, NO_COLOR="1", TERM="dumb"),
    ]
    assert {run.status for run in runs} == {0}
    assert len({run.stdout for run in runs}) == 1
    text = runs[0].stdout
    assert "\x1b" not in text
    assert text.isascii()
    assert not any(line != line.rstrip() for line in text.splitlines())
    for name in source_tensors("ttt_layernorms"):
        assert re.search(rf"^{re.escape(name)} +F32 +\(", text, re.MULTILINE)
    assert "lm_head_layernorm.weight                  F32    (64)       pre_lm_head_lay" in text
    assert f"speculators convert eagle '{source}' OUTPUT BASE_MODEL" in text


def test_names_that_mean_something_to_rich_or_no_encoding_knows(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "[bold]é:smile:")
    for encoding in ("utf-8", "ascii"):
        run = run_process("inspect", source, PYTHONIOENCODING=encoding)
        assert run.status == 0
        shown = "é" if encoding == "utf-8" else "\\xe9"
        assert f"[bold]{shown}:smile:: an EAGLE-1" in run.stdout


def test_json_of_what_cannot_be_read(tmp_path: Path, speculators: CommandLine) -> None:
    """One object, whatever happens."""
    done = speculators("inspect", tmp_path, "--json")
    assert done.status == 1
    found = Finding.model_validate_json(done.stdout)
    assert (found.kind, found.name) == ("unknown", str(tmp_path))
    assert found.conversion.why_not == done.errors[0]
    assert "has no config.json" in done.errors[0]
