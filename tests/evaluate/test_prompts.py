"""Files of prompts: our own, those in MT-bench's style, and invalid ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from speculators.errors import PromptsError
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts

MT_BENCH_CATEGORIES = {
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
}


def write(path: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def test_our_own_prompts_cover_the_categories_evenly() -> None:
    prompts = read_prompts(OWN_PROMPTS)
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(MT_BENCH_CATEGORIES, 10)
    assert len({prompt.messages for prompt in prompts}) == len({p.id for p in prompts}) == 80
    for start in range(0, 80, 8):  # so that the first few, too, are of every kind
        assert {p.category for p in prompts[start : start + 8]} == MT_BENCH_CATEGORIES


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    prompts = read_prompts(
        write(
            tmp_path / "prompts.jsonl",
            {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": []},
            "",
            {"prompt": "three"},
            {"messages": conversation, "question_id": "a7"},
        )
    )
    found = [(p.id, p.category, [message.model_dump() for message in p.messages]) for p in prompts]
    assert found == [
        ("81", "writing", [{"role": "user", "content": "one"}]),
        ("3", "uncategorized", [{"role": "user", "content": "three"}]),
        ("a7", "uncategorized", conversation),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [prompt.messages[0].content for prompt in read_prompts(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 2 is not valid JSON: Expecting ',' delimiter at column 15\.$"),
        ("[" * 100_000, r"line 2 is not valid JSON"),
        ('["a"]', r"line 2 is not a JSON object"),
        ({}, r"line 2: one of turns, prompt and messages is expected\.$"),
        ({"prompt": "a", "turns": ["b"]}, r"line 2: .*, found turns and prompt\.$"),
        ({"prompt": ""}, r"line 2: key prompt: String should have at least 1 character\.$"),
        ({"prompt": 3}, r"line 2: key prompt: Input should be a valid string\.$"),
        ({"turns": []}, r"line 2: key turns: List should have at least 1 item"),
        ({"turns": "a"}, r"line 2: key turns: Input should be a valid list\.$"),
        ({"turns": [None]}, r"line 2: key turns\.0: "),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"line 2: key messages\.0\.role: "),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"line 2: the last of messages"),
        ({"prompt": "a", "category": ["b"]}, r"line 2: key category: "),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(PromptsError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 2")


def a_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"cannot be read: No such file or directory\.$"),
        (a_directory, r"cannot be read: Is a directory\.$"),
        (lambda path: path.write_bytes(b""), r"has no prompts"),
        (lambda path: path.write_bytes(b"\n \n"), r"has no prompts"),
        (lambda path: path.write_bytes(b'{"prompt": "\xff"}'), r"is not text in UTF-8"),
    ],
    ids=["missing", "a directory", "empty", "blank", "not UTF-8"],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    make(path)
    with pytest.raises(PromptsError, match=message):
        read_prompts(path)
