"""Which conversions of a batch count as done: what must agree with conversion.json."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import GOLDEN, PLAIN, write_checkpoint
from hub_server import HubServer, patch_hub
from speculators.batch.manifest import Conversion
from speculators.batch.state import is_done
from speculators.checkpoint.hub.access import HubAccess
from speculators.convert.eagle import EagleConverter
from speculators.errors import OutputError


def entry(**keys: Any) -> Conversion:
    return Conversion.model_validate({"family": "eagle", "validate": False} | keys)


def convert(conversion: Conversion, **options: Any) -> None:
    EagleConverter().convert(
        conversion.input,
        conversion.output,
        conversion.base_model,
        revision=conversion.revision,
        dtype=conversion.dtype,
        **{"validate": False, **options},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def done(tmp_path: Path, source: Path, verifier: Path) -> Conversion:
    """A conversion that is done, without validation."""
    conversion = entry(input=str(source), output=tmp_path / "out", base_model=str(verifier))
    convert(conversion)
    return conversion


def reason(conversion: Conversion) -> str:
    """The reason why the output does not count as the conversion's."""
    with pytest.raises(OutputError) as caught:
        is_done(conversion)
    text = str(caught.value)
    begin = f"{conversion.output} exists, and is not what this entry makes: "
    end = "; choose another output, or set overwrite if it is a converted checkpoint."
    assert text.startswith(begin)
    assert text.endswith(end)
    return text.removeprefix(begin).removesuffix(end)


def test_an_output_that_is_missing_or_empty_is_to_be_made(tmp_path: Path, verifier: Path) -> None:
    conversion = entry(input="org/draft", output=tmp_path / "out", base_model=str(verifier))
    assert not is_done(conversion)
    conversion.output.mkdir()
    assert not is_done(conversion)


def test_what_was_converted_is_done(done: Conversion) -> None:
    assert is_done(done)
    assert is_done(done.model_copy(update={"overwrite": True}))


def test_a_path_may_be_written_in_several_ways(done: Conversion, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(done.input)
    assert is_done(done.model_copy(update={"input": str(tmp_path / "link")}))


def test_what_is_validated_need_not_be_asked_for(tmp_path: Path, verifier: Path) -> None:
    conversion = entry(input=str(GOLDEN / PLAIN), output=tmp_path / "out", base_model=str(verifier))
    convert(conversion, validate=True)
    assert is_done(conversion)
    assert is_done(conversion.model_copy(update={"validated": True}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input": "/elsewhere"}, "its input was {source}"),
        ({"input": "org/draft"}, "its input was {source}"),
        ({"base_model": "org/verifier"}, "its verifier was {verifier}"),
        ({"dtype": "float16"}, "its dtype was kept"),
        ({"validated": True}, "it was not validated"),
        ({"asked": ("fusion_bias",)}, "it has no bias on fc"),
        ({"asked": ("layernorms",)}, "it has no extra layernorms"),
    ],
)
def test_the_entry_has_to_be_the_one_that_was_converted(
    done: Conversion, source: Path, verifier: Path, changes: dict[str, Any], expected: str
) -> None:
    changed = done.model_copy(update=changes)
    assert reason(changed) == expected.format(source=source, verifier=verifier)
    assert not is_done(changed.model_copy(update={"overwrite": True}))


def test_the_dtype_it_was_rounded_to(tmp_path: Path, source: Path, verifier: Path) -> None:
    conversion = entry(
        input=str(source), output=tmp_path / "out", base_model=str(verifier), dtype="bfloat16"
    )
    convert(conversion)
    assert is_done(conversion)
    assert reason(conversion.model_copy(update={"dtype": None})) == (
        "its dtype was rounded to bfloat16"
    )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("conversion.json", Path.unlink, "it has no conversion.json"),
        ("conversion.json", cut, "its config.json or conversion.json cannot be read"),
        ("config.json", cut, "its config.json or conversion.json cannot be read"),
        ("config.json", Path.unlink, "it is not a converted checkpoint"),
        ("model.safetensors", cut, "model.safetensors is missing or has another size"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing or has another size"),
    ],
)
def test_the_output_has_to_be_whole(
    done: Conversion, file: str, change: Callable[[Path], None], expected: str
) -> None:
    change(done.output / file)
    if file == "conversion.json" and change is cut:
        cut(done.output / file)  # the first byte cut is only the end of the line
    if file == "config.json" and change is cut:
        cut(done.output / file)
    assert reason(done) == expected


def test_something_else_at_the_output_is_never_replaced(done: Conversion) -> None:
    shutil.rmtree(done.output)
    done.output.mkdir()
    (done.output / "thesis.tex").touch()
    insisting = done.model_copy(update={"overwrite": True})
    assert reason(done) == reason(insisting) == "it is not a converted checkpoint"


def test_a_file_at_the_output_is_in_the_way(done: Conversion) -> None:
    shutil.rmtree(done.output)
    done.output.touch()
    with pytest.raises(OutputError, match="is not a directory"):
        is_done(done)


def test_an_input_that_has_changed(done: Conversion, source: Path) -> None:
    file = source / "config.json"
    later = time.time() + 60
    os.utime(file, (later, later))  # without a hash, nothing shows whether it was changed
    assert reason(done) == f"{file} is newer"
    file.write_text(file.read_text() + "\n")
    assert reason(done) == f"{file} has changed since"
    file.unlink()
    assert reason(done) == f"{file} has changed since"


def test_an_input_that_was_only_copied_again(tmp_path: Path, source: Path, verifier: Path) -> None:
    conversion = entry(input=str(source), output=tmp_path / "out", base_model=str(verifier))
    convert(conversion, validate=True)  # so that its hashes are known
    later = time.time() + 60
    for file in source.iterdir():
        os.utime(file, (later, later))
    assert is_done(conversion)
    file = source / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    os.utime(file, (later, later))
    assert reason(conversion) == f"{file} is newer"


# On the Hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        yield server


def test_a_branch_that_has_moved_on(
    server: HubServer, tmp_path: Path, source: Path, verifier: Path, log: list[str]
) -> None:
    old = server.add_repo("org/draft", source)
    conversion = entry(input="org/draft", output=tmp_path / "out", base_model=str(verifier))
    convert(conversion)
    pinned = conversion.model_copy(update={"revision": old})
    assert is_done(conversion)
    assert is_done(pinned)

    new = server.add_repo(
        "org/draft", write_checkpoint(tmp_path / "new", config={"bias": False, "x": 1})
    )
    assert new != old
    server.requests.clear()
    assert is_done(pinned)
    assert not server.requests
    assert reason(conversion) == f"org/draft was at the commit {old}, and is at {new} now"
    assert is_done(conversion.model_copy(update={"revision": old}))
    wanted = reason(conversion.model_copy(update={"revision": new}))
    assert wanted == f"org/draft was at the commit {old}, and is at {new} now"


def test_a_hub_that_does_not_answer(
    server: HubServer, tmp_path: Path, source: Path, verifier: Path, log: list[str]
) -> None:
    server.add_repo("org/draft", source)
    conversion = entry(input="org/draft", output=tmp_path / "out", base_model=str(verifier))
    convert(conversion)
    server.fail("config.json", "HEAD", status=403)
    assert is_done(conversion)  # by the commit that the cache has for the branch
    assert is_done(conversion, HubAccess(tmp_path / "empty"))
    assert log[-1].startswith("WARNING ")
    assert log[-1].endswith(f" {conversion.output} is assumed to be up to date.")
