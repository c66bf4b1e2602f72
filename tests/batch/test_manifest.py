"""The manifest of a batch: how it is read, and the error for every way to get it wrong."""

import json
from pathlib import Path

import pytest

from speculators.batch.manifest import Entry, read_manifest
from speculators.errors import ManifestError
from speculators.families.eagle import EAGLE

ENTRY = {"input": "org/draft", "output": "out", "base_model": "org/verifier"}


def write_manifest(directory: Path, *entries: object, name: str = "batch.json") -> Path:
    file = directory / name
    file.write_text(json.dumps(entries))
    return file


def test_every_key_has_the_default_of_the_command_line(tmp_path: Path) -> None:
    (conversion,) = read_manifest(write_manifest(tmp_path, ENTRY), EAGLE)
    assert conversion.model_dump(by_alias=True) == {
        "input": "org/draft",
        "output": tmp_path / "out",
        "base_model": "org/verifier",
        "revision": None,
        "family": "eagle",
        "asked": (),
        "options": {},
        "validate": True,
        "dtype": None,
        "overwrite": False,
        "push_to_hub": None,
        "private": False,
        "report": None,
    }


def test_short_names_of_dtypes(tmp_path: Path) -> None:
    """They mean the same: an output that has been made with the long one is done."""
    for short, long in {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.items():
        (conversion,) = read_manifest(write_manifest(tmp_path, ENTRY | {"dtype": short}))
        assert conversion.dtype == long


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """As in a checkpoint's config.json; editors on Windows write it."""
    manifest = write_manifest(tmp_path, ENTRY)
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert len(read_manifest(manifest)) == 1


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    full = {
        "revision": "v2",
        "layernorms": True,
        "fusion_bias": True,
        "dtype": "float16",
        "overwrite": True,
    }
    full |= {"push_to_hub": "org/one", "private": True, "report": "report", "validate": True}
    yaml = tmp_path / "batch.yaml"
    yaml.write_text(
        """
        # drafts of one verifier
        - &first
          input: org/draft
          output: out
          base_model: org/verifier
        - <<: *first
          output: other
          revision: v2
          layernorms: true
          fusion_bias: true
          validate: true
          dtype: float16
          overwrite: true
          push_to_hub: org/one
          private: true
          report: report
        """
    )
    json_file = write_manifest(tmp_path, ENTRY, ENTRY | {"output": "other"} | full)
    assert read_manifest(yaml, EAGLE) == read_manifest(json_file, EAGLE)


def test_paths_are_relative_to_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "drafts" / "one").mkdir(parents=True)
    (tmp_path / "verifier").mkdir()
    write_manifest(
        tmp_path / "lists",
        {"input": "drafts/one", "output": "../out/one", "base_model": "../verifier"},
        {"input": "./missing", "output": "/srv/out", "base_model": "drafts/two"},
    )
    monkeypatch.chdir(tmp_path)
    one, two = read_manifest(Path("lists", "batch.json"), EAGLE)
    assert one.input == str(tmp_path / "lists" / "drafts" / "one")
    assert one.output.resolve() == tmp_path / "out" / "one"
    assert Path(one.base_model).resolve() == tmp_path / "verifier"
    assert two.input == str(tmp_path / "lists" / "missing")
    assert two.output == Path("/srv/out")
    assert two.base_model == "drafts/two"  # nothing is there: a Hugging Face id


def sentence(file: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(file, EAGLE)
    text = str(caught.value)
    assert text.startswith(str(file))
    assert text.endswith(".")
    assert "\n" not in text
    return text.removeprefix(str(file))


KEYS = ", ".join(
    [field.alias or name for name, field in Entry.model_fields.items()]
    + [flag.feature for flag in EAGLE.flags]
)
NO_LIST = " has to be a list of conversions, each with input, output and base_model."
WRITTEN_TOO = ", which entry 1 writes; make two batches of them."
TWICE = " cannot be understood: the key 'input' is there twice in one entry."


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            [ENTRY, ENTRY | {"output": "b", "dtpye": "x"}],
            ", entry 2 has the unknown key 'dtpye' (did you mean 'dtype'?); the keys are "
            + KEYS
            + ".",
        ),
        ([{"input": "a", "output": "b"}], ", entry 1 has no base_model."),
        ([ENTRY | {"input": ""}], ", entry 1, key input: String should have at least 1 character."),
        (
            [ENTRY | {"revision": 1234567}],
            ", entry 1, key revision: Input should be a valid string.",
        ),
        (
            [ENTRY | {"dtype": "int8"}],
            (
                ", entry 1, key dtype: int8 is not known; choose one of float32, float16, "
                "bfloat16, fp32, fp16, bf16."
            ),
        ),
        (
            [ENTRY | {"dtype": "flaot16"}],
            (
                ", entry 1, key dtype: flaot16 is not known; choose one of float32, float16, "
                "bfloat16, fp32, fp16, bf16 (did you mean 'float16'?)."
            ),
        ),
        (
            [ENTRY | {"validated": True}],
            (
                ", entry 1 has the unknown key 'validated' (did you mean 'validate'?); the keys "
                f"are {KEYS}."
            ),
        ),
        (["org/draft"], f", entry 1 is not a mapping of keys to values; the keys are {KEYS}."),
        ([], NO_LIST),
        (
            [ENTRY, ENTRY | {"output": "./b/../out"}],
            ", entries 1 and 2 have the same output {}/out.",
        ),
        (
            [ENTRY | {"output": "out/b"}, ENTRY],
            ", entry 1 has its output {}/out/b within that of entry 2.",
        ),
        (
            [ENTRY, ENTRY | {"input": "./out", "output": "b"}],
            ", entry 2 reads {}/out" + WRITTEN_TOO,
        ),
        (
            [ENTRY, ENTRY | {"base_model": "./out/v", "output": "b"}],
            ", entry 2 reads {}/out/v" + WRITTEN_TOO,
        ),
        (
            [ENTRY | {"private": True}],
            ", entry 1: private and report only work with push_to_hub.",
        ),
        (
            [ENTRY | {"push_to_hub": "a/b", "validate": False}],
            ", entry 1: what is published has to be validated.",
        ),
        (
            [ENTRY | {"push_to_hub": "a/b"}, ENTRY | {"output": "b", "push_to_hub": "a/b"}],
            ", entries 1 and 2 are both published at a/b.",
        ),
        ([ENTRY | {"input": "./out"}], ", entry 1 reads {}/out" + WRITTEN_TOO),
    ],
)
def test_a_wrong_entry_is_told_by_its_number(
    tmp_path: Path, entries: list[object], expected: str
) -> None:
    assert sentence(write_manifest(tmp_path, *entries)) == expected.replace("{}", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("batch.json", "{}", NO_LIST),
        (
            "batch.json",
            "[{",
            " cannot be understood: Expecting property name enclosed in double quotes: line 1 ",
        ),
        ("batch.json", '[{"input": 1, "input": 2}]', TWICE),
        ("batch.json", "[" * 100_000, " cannot be understood: maximum recursion depth exceeded"),
        ("batch.yaml", "- input: a\n  input: b\n", TWICE),
        (
            "batch.yaml",
            "- input: a\n  output: b: c\n",
            " cannot be understood: line 2: mapping values are not allowed here.",
        ),
        (
            "batch.yaml",
            "- !!python/object/apply:os.getpid []\n",
            " cannot be understood: line 1: could not determine a constructor for the tag ",
        ),
        ("batch.yaml", "? [a, b]\n: c\n", " cannot be understood: line 1: found unhashable key."),
        ("batch.yaml", "", NO_LIST),
        ("batch.yaml", "\x00", " cannot be understood: "),
    ],
)
def test_what_is_no_list_is_told(tmp_path: Path, name: str, text: str, expected: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert sentence(file).startswith(expected)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert sentence(tmp_path / "none.yaml") == " cannot be read: No such file or directory."
    (tmp_path / "latin.yaml").write_bytes(b"- input: \xe9")
    assert sentence(tmp_path / "latin.yaml") == " cannot be read: it is not text in UTF-8."
