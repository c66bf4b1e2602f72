"""conversion.json records what a converted checkpoint was made from; `validate` checks it."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    WRITTEN,
    CommandLine,
    config_of,
    entries,
    golden_vectors,
    source_tensors,
    stored_tensors,
    write_checkpoint,
    write_shards,
)
from hub_server import HubServer, patch_hub
from speculators import __version__
from speculators.convert.eagle import EagleConverter
from speculators.convert.proof import Proof
from speculators.format.conversion import ConversionRecord

convert = EagleConverter().convert
validate = EagleConverter().validate


def record_of(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "conversion.json").read_text())
    return record


def described(path: Path, *, hashed: bool = True) -> dict[str, Any]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest() if hashed else None
    return {"bytes": len(data), "sha256": digest}


# What is recorded


def test_the_record_of_a_conversion(tmp_path: Path, verifiers: dict[str, Path]) -> None:
    name, head = "ttt_layernorms", "lm_head.weight"
    source = write_checkpoint(
        tmp_path / "source",
        name=name,
        edit=lambda t: t.update({head: golden_vectors(name)[head]}),
        config={"head_dim": 32},
    )
    out = convert(source, tmp_path / "out", verifiers[name])
    record = record_of(out)
    assert record["speculators_version"] == __version__
    assert record["source"] == {
        "name": str(source),
        "revision": None,
        "files": {n: described(source / n) for n in ("config.json", "model.safetensors")},
    }
    assert record["verifier"] == {"name": str(verifiers[name]), "revision": None}
    assert record["dtype"] is None
    names = {stored: stored for stored in source_tensors(name)}
    assert record["tensors"] == {
        {
            "embed_layernorm.weight": "post_embedding_layernorm.weight",
            "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
        }.get(stored, stored): stored
        for stored in names
    }
    assert record["left_out"] == {head: "logits come from the verifier's own head"}
    assert "transformers_version" in record["config_left_out"]
    assert any("head_dim 32, the tensors have 16" in note for note in record["discrepancies"])
    assert record["validated"] is True
    assert record["unchecked"] == []
    assert record["files"] == {n: described(out / n) for n in ("config.json", "model.safetensors")}
    assert (out / "conversion.json").stat().st_size < 10_000


def test_without_validation_sizes_are_known_and_hashes_are_not(
    tmp_path: Path, verifier: Path
) -> None:
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False)
    record = record_of(out)
    assert record["validated"] is False
    names = ("config.json", "model.safetensors")
    assert record["files"] == {name: described(out / name, hashed=False) for name in names}
    assert record["source"]["files"] == {
        name: described(GOLDEN / PLAIN / name, hashed=False) for name in names
    }


def test_what_could_not_be_checked_is_recorded(tmp_path: Path, verifier: Path) -> None:
    bare = tmp_path / "verifier"
    bare.mkdir()
    shutil.copy(verifier / "config.json", bare)
    record = record_of(convert(GOLDEN / PLAIN, tmp_path / "out", bare))
    assert record["validated"] is True
    assert len(record["unchecked"]) == 1
    assert record["unchecked"][0].startswith("Logits were not validated, since the verifier's head")


def test_shards_are_recorded_each(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    tensors = source_tensors()
    fc = {"fc.weight": tensors.pop("fc.weight")}
    write_shards(source, {"one.safetensors": fc, "two.safetensors": tensors})
    files = record_of(convert(source, tmp_path / "out", verifier))["source"]["files"]
    names = ("config.json", "one.safetensors", "two.safetensors")
    assert files == {name: described(source / name) for name in names}


def test_a_relative_source_is_recorded_by_its_absolute_path(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    out = convert("./source", "out", verifier, validate=False)
    assert record_of(out)["source"]["name"] == str(tmp_path / "source")


def test_what_comes_from_the_hub_is_told_by_its_commit(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        commit = server.add_repo("org/draft", GOLDEN / PLAIN)
        verifiers_commit = server.add_repo("org/verifier", verifier)
        out = convert("org/draft", tmp_path / "out", "org/verifier")
        record = record_of(out)
        assert record["source"]["name"] == "org/draft"
        assert record["source"]["revision"] == commit
        assert record["source"]["files"] == {
            name: described(GOLDEN / PLAIN / name) for name in ("config.json", "model.safetensors")
        }
        assert record["verifier"] == {"name": "org/verifier", "revision": verifiers_commit}
        server.add_repo("org/draft", write_checkpoint(tmp_path / "newer", config={"x": 1}))
        validate(out, "org/draft", revision=record["source"]["revision"])


def test_the_rounding_is_recorded(tmp_path: Path, verifier: Path) -> None:
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False, dtype="float16")
    assert record_of(out)["dtype"] == "float16"


def test_the_record_says_nothing_of_when_and_where_to(tmp_path: Path, verifier: Path) -> None:
    one, two = (convert(GOLDEN / PLAIN, tmp_path / name, verifier) for name in ("one", "two"))
    assert (one / "conversion.json").read_bytes() == (two / "conversion.json").read_bytes()


def test_the_schema_describes_every_key() -> None:
    schema = ConversionRecord.model_json_schema()
    required = {"speculators_version", "source", "verifier", "tensors", "left_out", "files"}
    assert required <= set(schema["required"])


# Checked again


def test_the_log_of_a_check_to_the_letter(
    converted: dict[str, Path], speculators: CommandLine
) -> None:
    before = entries(converted[PLAIN])
    run = speculators("validate", converted[PLAIN])
    assert run.status == 0
    assert run.stdout == ""
    assert run.messages == [
        f"Checking converted checkpoint: {converted[PLAIN]}",
        "Model loaded successfully",
        "Forward pass successful",
        f"Valid: {converted[PLAIN]}",
    ]
    run = speculators("validate", converted[PLAIN], "--source", GOLDEN / PLAIN)
    assert run.status == 0
    assert run.messages == [
        f"Checking converted checkpoint: {converted[PLAIN]}",
        "Loaded 10 weights",
        "Validating converted checkpoint...",
        "Model loaded successfully",
        "Forward pass successful",
        f"Valid: {converted[PLAIN]}",
    ]
    assert entries(converted[PLAIN]) == before


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("with_source", [True, False])
def test_every_conversion_is_valid(
    converted: dict[str, Path], log: list[str], name: str, with_source: bool
) -> None:
    validate(converted[name], GOLDEN / name if with_source else None)
    assert any(line.startswith("SUCCESS Valid: ") for line in log)
    # The warnings of a conversion are logged again when it is planned again.
    expected = 1 if with_source and name == "rope_linear" else 0
    assert len([line for line in log if line.startswith("WARNING")]) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", [None, GOLDEN / PLAIN])
def test_a_rounded_conversion_is_valid(
    tmp_path: Path, verifier: Path, dtype: str, source: Path | None
) -> None:
    validate(convert(GOLDEN / PLAIN, tmp_path / "out", verifier, dtype=dtype), source)


def flip(name: str, position: int = -1) -> Callable[[Path], object]:
    def spoil(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[position] ^= 1
        (out / name).write_bytes(data)

    return spoil


def edit_json(name: str, **keys: Any) -> Callable[[Path], object]:
    def spoil(out: Path) -> None:
        content = json.loads((out / name).read_text()) | keys
        (out / name).write_text(json.dumps(content))

    return spoil


def without(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).unlink()


def another_theta(out: Path) -> None:
    layer = config_of(out)["transformer_layer_config"] | {"rope_theta": 10000.0}
    edit_json("config.json", transformer_layer_config=layer)(out)


def another_tensor(out: Path) -> None:
    tensors = stored_tensors(out)
    tensors["fc.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors")


def nan(out: Path) -> None:
    tensors = stored_tensors(out)
    tensors["fc.weight"][0, 0] = torch.nan
    save_file(tensors, out / "model.safetensors")


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(out: Path) -> None:
        for one in spoils:
            one(out)

    return spoil


NO_RECORD = without("conversion.json")
BAD_RECORD = {"source": {"name": "x", "files": {"../x": {"bytes": 1}}}}

# What is done to the output; the error without the source, and with it (None: not detected).
SPOILT: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {
    "a bit of the weights": (
        flip("model.safetensors"),
        r"model\.safetensors is not the file that was written",
        r"model\.safetensors is not the file that was written",
    ),
    "a key of the config": (
        another_theta,
        r"config\.json is not the file that was written",
        r"config\.json is not the file that was written",
    ),
    "no weights": (without("model.safetensors"), "has no weights", "has no weights"),
    "no config": (without("config.json"), "has no config.json", "has no config.json"),
    "a record that is no JSON": (
        lambda out: (out / "conversion.json").write_text("{"),
        r"conversion\.json is not valid JSON",
        r"conversion\.json is not valid JSON",
    ),
    "a record that leads elsewhere": (
        edit_json("conversion.json", **BAD_RECORD),
        r"conversion\.json, key source\.files\.\.\./x",
        r"conversion\.json, key source\.files\.\.\./x",
    ),
    "a record of another file": (
        edit_json("conversion.json", files={"weights.bin": {"bytes": 1, "sha256": None}}),
        r"lacks weights\.bin",
        r"lacks weights\.bin",
    ),
    "another tensor, without a record": (
        both(another_tensor, NO_RECORD),
        None,
        r"fc\.weight differs from fc\.weight of the source",
    ),
    "another config, without a record": (
        both(another_theta, NO_RECORD),
        None,
        r"it has another transformer_layer_config",
    ),
    "NaN, without a record": (both(nan, NO_RECORD), "not finite", "differs from"),
    "a tensor less, without a record": (
        both(
            lambda out: save_file(
                {n: t for n, t in stored_tensors(out).items() if n != "fc.weight"},
                out / "model.safetensors",
            ),
            NO_RECORD,
        ),
        r"lacks fc\.weight, by its config\.json",
        r"lacks fc\.weight, by its config\.json",
    ),
    "not converted": (
        edit_json("config.json", speculators_model_type=None),
        "incorrect speculators_model_type",
        "incorrect speculators_model_type",
    ),
    "not there": (shutil.rmtree, "does not exist", "does not exist"),
}


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_is_found(
    tmp_path: Path,
    converted: dict[str, Path],
    speculators: CommandLine,
    case: str,
    with_source: bool,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted[PLAIN], out)
    spoil, alone, against_source = SPOILT[case]
    spoil(out)
    options = ["--source", GOLDEN / PLAIN] if with_source else []
    run = speculators("validate", out, *options)
    expected = against_source if with_source else alone
    assert "Traceback" not in run.stderr
    if expected is None:
        assert run.status == 0
        assert any("has no conversion.json" in message for message in run.messages)
    else:
        assert run.status == 1
        assert len(run.errors) == 1
        assert re.search(expected, run.errors[0]), run.errors[0]


def test_another_source_is_found(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    other = write_checkpoint(tmp_path / "other", edit=lambda t: t["fc.weight"][1, 1].add_(1e-3))
    run = speculators("validate", converted[PLAIN], "--source", other)
    assert run.status == 1
    assert "fc.weight differs from fc.weight of the source" in run.errors[0]


def test_a_source_in_another_container_gives_the_same_and_the_log_says_so(
    tmp_path: Path, converted: dict[str, Path], log: list[str]
) -> None:
    same = write_checkpoint(tmp_path / "same", container="pytorch_model.bin")
    validate(converted[PLAIN], same)
    warnings = [line for line in log if line.startswith("WARNING")]
    assert any("pytorch_model.bin of" in line and "gives the same" in line for line in warnings)


def test_without_hashes_the_log_says_that_sizes_were_checked(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False)
    run = speculators("validate", out)
    assert run.status == 0
    assert any("only the sizes were checked" in message for message in run.messages)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes() + b"\0")
    run = speculators("validate", out)
    assert run.status == 1
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False, overwrite=True)
    flip("model.safetensors")(out)
    assert speculators("validate", out, "--source", GOLDEN / PLAIN).status == 1


def test_where_the_verifier_is_gone_the_rest_is_checked(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    shutil.copytree(verifier, tmp_path / "verifier")
    out = convert(GOLDEN / PLAIN, tmp_path / "out", tmp_path / "verifier")
    shutil.rmtree(tmp_path / "verifier")
    for source in (None, GOLDEN / PLAIN):
        log.clear()
        validate(out, source)
        assert any(line.startswith("WARNING Logits were not validated") for line in log)
        proven = "has the files that" if source is None else "has the config and the tensors that"
        assert log[-1].startswith(f"SUCCESS Valid: {out}. Proven: it {proven} ")
        assert " and computes what its tensors say. Left open: Logits were not val" in log[-1]


def test_what_is_left_open_is_sentences() -> None:
    proof = Proof(["computes what its tensors say"], ["This was not: it is gone", "Nor that."])
    assert str(proof).endswith(" Left open: This was not: it is gone. Nor that.")


def test_without_a_record_it_is_said_what_was_proven(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted[PLAIN], out)
    NO_RECORD(out)
    run = speculators("validate", out)
    assert run.status == 0
    assert run.messages[-1] == (
        f"Valid: {out}. Proven: it computes what its tensors say. Left open: {out} has no "
        "conversion.json: what was written is not known."
    )
    # The source tells what the record would.
    run = speculators("validate", out, "--source", GOLDEN / PLAIN)
    assert run.messages[-1] == f"Valid: {out}"


def test_how_to_speculate_may_be_changed(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    """Editing it changes config.json, but the draft is still the source's."""
    out = tmp_path / "out"
    shutil.copytree(converted[PLAIN], out)
    how = config_of(out)["speculators_config"]
    how["proposal_methods"][0]["speculative_tokens"] = 3
    edit_json("config.json", speculators_config=how)(out)
    assert speculators("validate", out).status == 1
    NO_RECORD(out)
    assert speculators("validate", out, "--source", GOLDEN / PLAIN).status == 0


def test_other_files_beside_are_no_concern(tmp_path: Path, converted: dict[str, Path]) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted[PLAIN], out)
    (out / "README.md").write_text("# A draft")
    validate(out)
    assert entries(out) == WRITTEN


@pytest.mark.parametrize("name", ["llama31_gqa_nobias", "ttt_layernorms"])
def test_the_older_layout_is_checked_too(
    tmp_path: Path, converted: dict[str, Path], name: str
) -> None:
    """speculators 0.1.0 to 0.3.0 wrote no conversion.json."""
    out = tmp_path / "out"
    shutil.copytree(converted[name], out)
    NO_RECORD(out)
    older = {"fc.": "fusion_fc.", "layers.0.": "transformer."}
    older |= {"post_embedding_layernorm.": "embedding_layernorm."}
    tensors = stored_tensors(out)
    for stored in list(tensors):
        for new, old in older.items():
            if stored.startswith(new):
                tensors[old + stored.removeprefix(new)] = tensors.pop(stored)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    validate(out)


def test_a_revision_without_a_source_is_a_mistake(
    converted: dict[str, Path], speculators: CommandLine
) -> None:
    run = speculators("validate", converted[PLAIN], "--revision", "main")
    assert run.status == 2
    assert "--revision only works with --source" in run.stderr
