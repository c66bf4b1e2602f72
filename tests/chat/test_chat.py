"""The command: what it answers, what it marks as drafted, and the page that shows it."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CommandLine
from mtp_verifiers import GOLDEN_MTP
from pair import Pair, make_pair
from speculators.chat.answer import Answer, Drafted, Piece, Spelling, Step
from speculators.chat.trace import trace_page
from speculators.decode import VerifiedStep
from speculators.models import load_draft

SAID = "Rain in Spain?"
NEW_TOKENS = 24
GREEN = re.compile(r"\x1b\[32m([^\x1b]*)\x1b\[0m")


class Shown(HTMLParser):
    """A page's spans, by class, and everything that could reach for the network."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._inside: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.links += [given[name] for name in ("href", "src", "action") if name in given]
        if tag in {"span", "td"}:
            self._inside.append((tag, given.get("class", "")))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1][0] == "span":
            self.spans.append((self._inside[-1][1], data))
        elif self._inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in {"span", "td"}:
            self._inside.pop()


def shown(page: str) -> Shown:
    parsed = Shown()
    parsed.feed(page)
    return parsed


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


def plain_answer(pair: Pair, conversation: str, new: int = NEW_TOKENS) -> str:
    """What the verifier's own ``generate`` says."""
    tokenizer = AutoTokenizer.from_pretrained(pair.verifier)
    ids = torch.tensor([tokenizer(conversation)["input_ids"]])
    verifier: Any = AutoModelForCausalLM.from_pretrained(pair.verifier)
    generated = verifier.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    # A character that is cut off at the end of an answer is not shown.
    return str(tokenizer.decode(generated[0, ids.shape[1] :])).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("proposal", ["greedy", "dynamic_tree"])
def test_steps_are_told_as_they_were(pair: Pair, proposal: str) -> None:
    """For two prompts at once: all tokens, and as many accepted as the generation counts."""
    verifier = AutoModelForCausalLM.from_pretrained(pair.verifier)
    draft = load_draft(pair.draft, verifier=verifier)
    ids = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(1))
    steps: list[VerifiedStep] = []
    generation: Any = draft.generate(
        ids,
        proposal=proposal,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        on_step=steps.append,
    )
    for prompt in range(2):
        of_prompt = [step for step in steps if step.prompt == prompt]
        assert of_prompt[0].drafted == ()
        added = [token for step in of_prompt for token in step.added]
        assert added == generation.sequences[prompt, 9:].tolist()
        assert [len(step.accepted) for step in of_prompt[1:]] == generation.accepted[prompt]
        assert any(step.accepted for step in of_prompt)
        for step in of_prompt[1:]:
            taken = [step.drafted[index] for index in step.accepted]
            assert list(step.added[: len(taken)]) == taken[: len(step.added)]
            before = -1
            for index in step.accepted:
                assert step.parents[index] == before
                before = index


def test_an_answer_is_the_verifiers_and_what_was_drafted_is_green(
    pair: Pair, speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    page = tmp_path / "trace.html"
    run = speculators(
        "chat", pair.draft, "--prompt", SAID, f"--max-new-tokens={NEW_TOKENS}", "--trace", page
    )
    assert run.status == 0, run.stderr
    expected = plain_answer(pair, f"<user>{SAID}<assistant>")
    text = re.sub(r"\x1b\[[\d;]*m", "", run.stdout)
    assert text.startswith(expected + "\n")
    assert f"\n{NEW_TOKENS} tokens, " in text
    assert "acceptance length " in text
    green = "".join(GREEN.findall(run.stdout))
    assert 0 < len(green) < len(expected)

    seen = shown(page.read_text(encoding="utf-8"))
    assert "script" not in seen.tags
    assert "link" not in seen.tags
    assert all(link.startswith("#answer-") for link in seen.links)
    steps = [cell for cell in seen.cells if re.fullmatch(r"\d+ of \d+", cell)]
    passes = re.search(r"of them drafted", text)
    assert passes
    assert len(steps) >= 3
    whole = "".join(text for _, text in seen.spans)
    assert expected in whole


def test_a_conversation_goes_on(
    pair: Pair,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a terminal, what was said and answered before belongs to the next prompt."""
    lines = iter([SAID, "", "And now shorter."])

    def read(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    run = speculators("chat", pair.draft, "--max-new-tokens=8")
    assert run.status == 0, run.stderr
    first = plain_answer(pair, f"<user>{SAID}<assistant>", 8)
    second = plain_answer(
        pair, f"<user>{SAID}<assistant>{first}<user>And now shorter.<assistant>", 8
    )
    assert first in run.stdout
    assert second in run.stdout
    assert run.stdout.count("8 tokens, ") == 2


def test_sampling_is_from_the_whole_distribution(
    pair: Pair, speculators: CommandLine, tmp_path: Path
) -> None:
    """As in an evaluation: with the top_p of the verifier's own config, this would be greedy."""
    verifier = shutil.copytree(pair.verifier, tmp_path / "verifier")
    settings = {"top_p": 1e-6, "top_k": 1, "temperature": 0.1}
    (verifier / "generation_config.json").write_text(json.dumps(settings))
    run = speculators(
        *("chat", pair.draft, "--verifier", verifier, "--prompt", SAID),
        *("--max-new-tokens", str(NEW_TOKENS), "--temperature", "5"),
    )
    assert run.status == 0, run.stderr
    assert not run.stdout.startswith(plain_answer(pair, f"<user>{SAID}<assistant>"))


def test_standard_input_is_one_prompt(
    pair: Pair, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\nplain."))
    run = speculators("chat", pair.draft, "--max-new-tokens=8")
    assert run.status == 0, run.stderr
    assert run.stdout.startswith(plain_answer(pair, "<user>The\nplain.<assistant>", 8))


def test_a_trace_is_not_replaced_unasked(
    pair: Pair, speculators: CommandLine, tmp_path: Path
) -> None:
    page = tmp_path / "trace.html"
    page.write_text("mine")
    run = speculators("chat", pair.draft, "--prompt", SAID, "--trace", page)
    assert run.status == 1
    assert run.messages == [f"{page} exists; give another --trace, or --overwrite to replace it."]
    assert page.read_text() == "mine"


@pytest.mark.parametrize("options", [["--prompt="], ["--prompt=x", "--system="], []])
def test_nothing_to_answer(
    pair: Pair, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    run = speculators("chat", pair.draft, *options)
    assert run.status == 2
    assert "empty" in run.stderr


def test_a_trace_that_cannot_be_written_is_told_before_anything_is_decoded(
    pair: Pair, speculators: CommandLine, tmp_path: Path
) -> None:
    page = tmp_path / "none" / "trace.html"
    run = speculators("chat", pair.draft, "--prompt", SAID, "--trace", page)
    assert run.status == 1
    assert run.messages == [f"{page} cannot be written: {page.parent} is not a directory."]
    assert run.stdout == ""


def test_the_trace_of_an_answer_that_was_interrupted(
    pair: Pair, speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "trace.html"
    pieces = Spelling.pieces

    def interrupted(self: Spelling, tokens: Any) -> list[Piece]:
        if len(self._tokens) > NEW_TOKENS // 2:
            raise KeyboardInterrupt
        return pieces(self, tokens)

    monkeypatch.setattr(Spelling, "pieces", interrupted)
    run = speculators("chat", pair.draft, "--prompt", SAID, "--trace", page)
    assert run.status == 130
    assert run.stdout.endswith("\n"), "what is said of it begins a line of its own"
    expected = plain_answer(pair, f"<user>{SAID}<assistant>", NEW_TOKENS // 2)
    assert expected in "".join(text for _, text in shown(page.read_text(encoding="utf-8")).spans)


def test_accepted_tokens_beyond_the_end_are_not_counted_as_drafted(
    pair: Pair, speculators: CommandLine
) -> None:
    """With as many tokens as the first drafted chain has, the answer is that but for one."""
    run = speculators("chat", pair.draft, "--prompt", SAID, "--max-new-tokens=2")
    assert run.status == 0, run.stderr
    found = re.search(r"acceptance length ([\d.]+), (\d+) of them drafted", run.stdout)
    assert found
    assert float(found[1]) > 2, "more were accepted than there was room for"
    assert found[2] == "1"


def test_an_mtp_is_refused(speculators: CommandLine) -> None:
    run = speculators("chat", GOLDEN_MTP, "--prompt", SAID)
    assert run.status == 1
    assert f"{GOLDEN_MTP} has an MTP, not a converted draft: `chat`" in run.errors[0]


def test_a_character_of_several_tokens_appears_when_it_is_complete() -> None:
    text = "a\N{GREEK SMALL LETTER ALPHA}\N{SNOWMAN}b" * 20
    spelling = Spelling(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = spelling.pieces((byte, True) for byte in text.encode())
    assert "".join(piece.text for piece in pieces) == text
    assert [len(piece.text) for piece in pieces] == [1] * len(text)


def drafted(*tokens: tuple[str, int, bool]) -> tuple[Drafted, ...]:
    return tuple(Drafted(*token) for token in tokens)


@pytest.fixture
def page() -> Callable[[tuple[Drafted, ...]], Shown]:
    def make(proposal: tuple[Drafted, ...]) -> Shown:
        added = sum(token.accepted for token in proposal) + 1
        step = Step(proposal, added, (Piece("<b>", drafted=False),), own="<b>")
        return shown(trace_page("A & B", [("draft", "d")], [Answer("<i>?", [step], 1.0)]))

    return make


def test_the_page_tells_refused_tokens_from_those_never_looked_at(
    page: Callable[[tuple[Drafted, ...]], Shown],
) -> None:
    """In a chain, and in a tree, where siblings of an accepted token were looked at."""
    chain = page(drafted(("x", -1, True), ("y", 0, False), ("z", 1, False)))
    classes = {text: kind for kind, text in chain.spans if text in "xyz"}
    assert classes == {"x": "drafted", "y": "refused", "z": "unused"}
    assert "1 of 3" in chain.cells
    assert {"b", "i"}.isdisjoint(chain.tags), "text is no markup"

    tree = page(drafted(("x", -1, False), ("y", -1, True), ("u", 0, False), ("v", 1, True)))
    classes = {text: kind for kind, text in tree.spans if text in "xyuv"}
    assert classes == {"x": "refused", "y": "drafted", "u": "unused", "v": "drafted"}
    assert "2 of 2" in tree.cells
