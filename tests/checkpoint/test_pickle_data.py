"""Pickles are read as data: their values are returned, their calls are refused by name."""

import contextlib
import copyreg
import io
import pickle
import re
import tracemalloc
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.hostile_pickles import BROKEN, UNSAFE, command, tuple_of, whole
from speculators.checkpoint.files import pickle_data
from speculators.checkpoint.files.pickle_data import (
    PYTHON_GLOBALS,
    Builder,
    Globals,
    Ignored,
    Items,
    OrderedItems,
    Refused,
    read_pickle,
)
from speculators.errors import CheckpointError, UnsafeCheckpointError, printable

TORCH_LIKE = {
    **PYTHON_GLOBALS,
    ("torch", "FloatStorage"): Ignored("storage"),
    ("torch", "float16"): Ignored("dtype"),
    ("torch", "device"): Builder(lambda *_: Ignored("device")),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(lambda *_: ("tensor",)),
}


def whole_storage(persistent_id: object) -> object:
    match persistent_id:
        case ("storage", Ignored(), str(), str(), int()):
            return Ignored("storage")
    raise Refused("a persistent id that names no storage")


def read(data: bytes, admitted: Globals = PYTHON_GLOBALS, **options: Any) -> object:
    return read_pickle(io.BytesIO(data), name="x.bin", size=len(data), admitted=admitted, **options)


def plain(value: object) -> object:
    """What was read, with ``Items`` as dicts."""
    if isinstance(value, Items):
        return {key: plain(item) for key, item in value.pairs}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


leaves = st.none() | st.booleans() | st.integers(-(1 << 2000), 1 << 2000) | st.text() | st.floats()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(values, st.integers(1, 5))
def test_plain_values_come_out_as_they_went_in(value: object, protocol: int) -> None:
    assert repr(plain(read(pickle.dumps(value, protocol)))) == repr(value)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"bytes\xff",
        bytearray(b"bytes"),
        {1, 2},
        frozenset({1}),
        1j,
        range(3),
        slice(1, 2),
        np.float64(0.5),
        np.int64(3),
        np.arange(6).reshape(2, 3),
        np.random.RandomState(0).get_state(),
        np.array(["a", "b"]),
        np.dtype("float32"),
    ],
    ids=str,
)
def test_other_harmless_values_are_read(value: object, protocol: int) -> None:
    items = read(pickle.dumps({"before": 1, "value": value, "after": 2}, protocol))
    assert isinstance(items, Items)
    (before, (_, found), after) = items.pairs
    assert (before, after) == (("before", 1), ("after", 2))
    assert isinstance(found, Ignored | bytes | bytearray | tuple)


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_dicts_of_other_classes_are_dicts_and_lose_their_attributes(protocol: int) -> None:
    ordered = OrderedDict(a=1, b=2)
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined]
    found = read(pickle.dumps(ordered, protocol))
    assert isinstance(found, OrderedItems)
    assert found.pairs == [("a", 1), ("b", 2)]

    default = read(pickle.dumps(defaultdict(dict, a=1), protocol))
    assert plain(default) == {"a": 1}
    assert isinstance(read(pickle.dumps(Counter("aab"), protocol)), OrderedItems)


def test_shared_values_stay_shared() -> None:
    shared = ["x"]
    found: Any = read(pickle.dumps([shared, shared]))
    assert found[0] is found[1]


def test_admitted_globals_are_what_the_caller_has_for_them() -> None:
    data = whole(b"cfractions\nFraction\n(K\x01K\x02tR")
    with pytest.raises(UnsafeCheckpointError, match=r"fractions\.Fraction"):
        read(data)
    admitted = {("fractions", "Fraction"): Builder(lambda a, b: f"{a}/{b}")}
    assert read_pickle(io.BytesIO(data), name="x", admitted=admitted) == "1/2"


def test_persistent_ids_go_to_the_caller() -> None:
    data = whole(b"(K\x01K\x02tQ")
    assert read(data, persistent=lambda pid: ("seen", pid)) == ("seen", (1, 2))
    with pytest.raises(UnsafeCheckpointError, match="a persistent id where none belongs"):
        read(data)


def test_reading_ends_at_stop() -> None:
    file = io.BytesIO(pickle.dumps("first") + pickle.dumps("second") + b"rest")
    assert [read_pickle(file, name="x", admitted={}) for _ in range(2)] == ["first", "second"]
    assert file.read() == b"rest"


@pytest.mark.parametrize("case", [case for case in UNSAFE if UNSAFE[case].works])
def test_the_hostile_pickles_do_work(case: str, tmp_path: Path) -> None:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return pid

    sentinel = tmp_path / "sentinel"
    with contextlib.suppress(pickle.UnpicklingError, EOFError, TypeError, AttributeError):
        Unpickler(io.BytesIO(UNSAFE[case].make(str(sentinel)))).load()
    assert sentinel.exists()


def test_the_registry_of_extensions_is_not_asked(tmp_path: Path) -> None:
    """A pickle may name a global by the number under which a module has registered it."""
    sentinel = tmp_path / "sentinel"
    data = whole(b"\x82\xf0" + tuple_of(command(str(sentinel))) + b"R")
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(UnsafeCheckpointError, match="the opcode EXT1"):
            read(data)
        assert not sentinel.exists()
        pickle.loads(data)
        assert sentinel.exists()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize("case", UNSAFE)
def test_what_is_not_admitted_is_refused_by_name(case: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    refused, make, _ = UNSAFE[case]
    with pytest.raises(UnsafeCheckpointError, match=re.escape(refused)) as caught:
        read(make(str(sentinel)), admitted=TORCH_LIKE, persistent=whole_storage)
    message = str(caught.value)
    assert message.startswith("x.bin was refused, and nothing in it was run")
    assert message.isprintable()
    assert not sentinel.exists()


@pytest.mark.parametrize("case", BROKEN)
def test_damage_and_bombs_end_in_an_error_of_ours_or_a_value(case: str) -> None:
    with contextlib.suppress(CheckpointError):
        assert read(BROKEN[case], admitted=TORCH_LIKE) is not None


@pytest.mark.parametrize(
    "case", [case for case in BROKEN if "exabytes" in case or "longer" in case or "all" in case]
)
def test_a_claimed_length_sets_no_memory_aside(case: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read(BROKEN[case])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_pickle_is_bounded_in_size_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(list(range(1000)))
    monkeypatch.setattr(pickle_data, "MAX_OPCODES", 100)
    with pytest.raises(CheckpointError, match="more than 16 MiB or 100 steps"):
        read(data)
    monkeypatch.undo()
    monkeypatch.setattr(pickle_data, "MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 0 MiB"):
        read(data)


def test_a_pickle_does_not_reach_beyond_its_size() -> None:
    data = pickle.dumps("a string")
    for size in range(len(data)):
        with pytest.raises(CheckpointError, match="makes no sense at byte"):
            read_pickle(io.BytesIO(data), name="x", size=size, admitted={})


@pytest.mark.parametrize(
    ("text", "shown"), [("a.b", "a.b"), ("a\n\x1b\u202e\ud800", r"a\n\x1b\u202e\ud800")]
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_is_short() -> None:
    assert printable("a" * 10_000) == "a" * 100 + "..."


@given(st.binary(max_size=200))
def test_random_bytes_end_in_an_error_of_ours_or_a_value(data: bytes) -> None:
    for start in (b"", b"\x80\x02}q\x00(", b"\x80\x04]\x94("):
        with contextlib.suppress(CheckpointError):
            read(start + data)


@given(values, st.data())
def test_mutated_pickles_end_in_an_error_of_ours_or_a_value(value: object, data: Any) -> None:
    raw = bytearray(pickle.dumps({"value": value, "array": np.arange(3)}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        read(bytes(raw))
