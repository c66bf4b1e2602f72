"""The commands and code of the documentation give the output that it shows; see ``pages``."""

import contextlib
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from huggingface_hub import constants
from loguru import logger
from typer.core import TyperGroup

import dflash
from eagle3 import GOLDEN3, TARGET
from helpers import GOLDEN, PLAIN, fork_processes, source_tensors
from hub_server import MEMBER, HubServer, patch_hub
from mtp_verifiers import write_verifier
from pages import PAGES, ROOT, RUN, SHOWN, Block, blocks
from speculators.cli import main
from speculators.cli.app import app
from speculators.convert.eagle import EagleConverter

VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"

VARYING = {
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d": "TIME",
    r"\b[0-9a-f]{40}\b": "COMMIT",
    r"127\.0\.0\.1:\d+": "HOST",
    r"(?<=  )\d+\.\d\b": "SECONDS",
}
"""What differs from run to run: one such value matches any other."""

FOUND_BY_HOME = ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH")
"""Removed from the environment: pages show what a user sees who sets at most HF_HOME."""

OPERATORS = frozenset({";", "|", "||", "&&", ">"})
SIMPLE = re.compile(
    r"(?:(?P<name>HF_TOKEN|HF_HUB_OFFLINE)=(?P<value>\w*) )?"
    r"(?P<call>speculators [^;&|<>()$*?~`]*)(?P<rest>(?:;|\|(?!\|)|>).*)?",
    re.DOTALL,
)
"""Matches a call of `speculators` that needs no shell, and what a shell does with its result."""

ALL = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def hub(verifier: Path) -> Iterator[HubServer]:
    """A Hub with small versions of the repositories that the pages name."""
    with HubServer() as server:
        server.add_repo("yuhuili/EAGLE-LLaMA3.1-Instruct-8B", GOLDEN / PLAIN)
        server.add_repo("meta-llama/Llama-3.1-8B-Instruct", verifier)
        server.add_repo("HuggingFaceTB/SmolLM2-135M-Instruct", VERIFIER)
        server.namespaces["member"].add("my-organization")
        yield server


@pytest.fixture(scope="module")
def real_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make demo`` creates."""
    output = tmp_path_factory.mktemp("demo") / "converted"
    source = ROOT / "examples" / "smollm2-135m-hass"
    return EagleConverter().convert(source, output, VERIFIER, validate=False)


@pytest.fixture
def directory(
    tmp_path: Path,
    verifier: Path,
    real_draft: Path,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Where a page's blocks run: with the files that they name, and `speculators` on the path."""
    here = tmp_path / "here"
    for name, target in {
        "verifier": verifier,
        ".cache/SmolLM2-135M-Instruct": VERIFIER,
        ".cache/converted": real_draft,
    }.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).symlink_to(target)

    (here / "verifier3").symlink_to(TARGET)
    (here / "draft3").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN3 / "eagle31_specforge" / name, here / "draft3")
    (here / "verifier-dflash").symlink_to(dflash.TARGET)
    dflash.write_draft(here / "draft-dflash", dflash.native())
    dflash.write_draft(here / "upstream-dflash", dflash.upstream())
    (here / "tests").mkdir()
    (here / "tests" / "golden-families").symlink_to(dflash.GOLDEN_FAMILIES)
    settings = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    write_verifier(here / "qwen3-next", config={"num_nextn_predict_layers": 1})
    write_verifier(
        here / "quantized",
        mtp={},
        config={"num_nextn_predict_layers": 1, "quantization_config": settings},
    )
    shutil.copytree(ROOT / "examples", here / "examples")
    config = GOLDEN / PLAIN / "config.json"
    for name in ("draft", "pointer", "hostile"):
        (here / name).mkdir()
        shutil.copy(config, here / name)
    shutil.copy(GOLDEN / PLAIN / "model.safetensors", here / "draft")
    torch.save(source_tensors(), here / "draft" / "pytorch_model.bin")
    (here / "pointer" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (here / "hostile" / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))

    program = tmp_path / "bin" / "speculators"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nfrom speculators.cli import main\nif __name__ == '__main__': main()\n"
    )
    program.chmod(0o755)
    patch_hub(monkeypatch, hub, tmp_path / "home", HF_TOKEN=MEMBER)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(here)
    return here


class Hostile:
    """Runs a command when pickle loads it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_every_block_says_what_it_is() -> None:
    for block in ALL:
        assert block.language in RUN | SHOWN or block.remark == "file", block.where
        assert block.remark != "not run" or block.language in RUN, block.where


@pytest.mark.parametrize(
    "block", [block for block in ALL if block.remark == "from"], ids=lambda block: block.where
)
def test_what_is_cited_is_there(block: Block) -> None:
    lines = [line.strip() for line in (ROOT / block.about).read_text("utf-8").splitlines()]
    at = 0
    for cited in filter(
        lambda line: line not in {"", "..."}, map(str.strip, block.text.split("\n"))
    ):
        assert cited in lines[at:], f"{block.where}: {cited}"
        at = lines.index(cited, at) + 1


def test_most_blocks_run() -> None:
    runnable = [block for block in ALL if block.language in RUN and block.remark != "from"]
    assert sum(block.remark != "not run" for block in runnable) > 20


@pytest.mark.parametrize(
    "own_process", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["here", "alone"]
)
@pytest.mark.parametrize("page", PAGES)
def test_what_is_shown_is_what_happens(page: str, own_process: bool, directory: Path) -> None:
    """Calls of `speculators` alone run in this process, which has torch; all else in a shell.

    Exhaustive: everything runs in a shell, as it does for a reader.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.remark == "file":
            (directory / block.about).write_text(block.text, encoding="utf-8")
        elif block.remark in {"not run", "from"} or (
            block.remark == "needs" and shutil.which(block.about) is None
        ):
            continue
        elif block.language == "python":
            run_python(block, namespace)
        elif block.language == "console":
            for command, shown in block.sessions:
                run_command(block, command, shown, own_process=own_process)
    assert not (directory / "owned").exists()


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(compile(block.text, block.where, "exec"), namespace)
    if block.printed:
        assert stdout.getvalue() == block.printed, block.where


def run_command(block: Block, command: str, shown: str, *, own_process: bool) -> None:
    simple = SIMPLE.fullmatch(command)
    with pytest.MonkeyPatch.context() as patch:
        for name in FOUND_BY_HOME:
            patch.delenv(name, raising=False)
        if own_process or simple is None:
            status, output = run_shell(command)
        else:
            if simple["name"] is not None:
                patch.setenv(simple["name"], simple["value"])
                patch.setattr(constants, "HF_HUB_OFFLINE", simple["name"] == "HF_HUB_OFFLINE")
            status, output = run_here(simple["call"], simple["rest"] or "")
    where = f"{block.where}: {command}{output}"
    if not shown or block.remark == "not compared":
        assert status == 0, where
    else:
        expected = re.escape(masked(shown)).replace("\\.\\.\\.\\\n", r"(?:.*\n)*")
        printed = "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())
        assert re.fullmatch(expected, masked(printed)), where


def run_shell(command: str) -> tuple[int, str]:
    """The exit status of a command, and what it prints."""
    done = subprocess.run(
        command,
        shell=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def run_here(command: str, rest: str) -> tuple[int, str]:
    """The same for a call of `speculators`, made in this process, and a shell for the rest."""
    status: object = 0
    with (
        tempfile.NamedTemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        pytest.MonkeyPatch.context() as patch,
    ):
        passed_on = rest.startswith(("|", ">"))
        patch.setattr(sys, "argv", words_of(command))
        # By which help tells `speculators` from `python -m pytest`.
        patch.setattr(sys.modules["__main__"], "__package__", None)
        fork_processes(patch)
        with streams_into(stdout.fileno(), (stderr if passed_on else stdout).fileno()):
            try:
                main()
            except SystemExit as stop:
                status = stop.code or 0
            finally:
                logger.remove()
        stdout.seek(0)
        stderr.seek(0)
        output = stderr.read() if passed_on else stdout.read()
        assert isinstance(status, int)
        if rest:
            before = f"cat {stdout.name} " if passed_on else f"(exit {status})"
            status, more = run_shell(before + rest)
            output += more
    return status, output


@contextlib.contextmanager
def streams_into(out: int, error: int) -> Iterator[None]:
    """Redirect the streams of this process, and of those that it starts, to two descriptors.

    They are buffered as in a pipe.
    """
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        os.dup2(out, 1)
        os.dup2(error, 2)
        with (
            open(2, "w", buffering=1, encoding="utf-8", closefd=False) as stderr,
            open(1, "w", encoding="utf-8", closefd=False) as stdout,
            contextlib.redirect_stderr(stderr),
            contextlib.redirect_stdout(stdout),
        ):
            yield
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def masked(text: str) -> str:
    for pattern, mask in VARYING.items():
        text = re.sub(pattern, mask, text, flags=re.MULTILINE)
    return text


def words_of(command: str) -> list[str]:
    """The words of a command for the shell; operators are words of their own."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True  # otherwise a colon, as in a URL, is a word of its own
    return [*lexer]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of `speculators` in a console, run or not: its place, and its arguments."""
    for block in ALL:
        for command, _ in block.sessions:
            for line in command.replace("\\\n", " ").splitlines():
                words = words_of(line)
                if words[:1] == ["speculators"]:
                    ends = (at for at, word in enumerate(words) if word in OPERATORS)
                    yield block.where, words[1 : next(ends, None)]


@pytest.mark.parametrize(("where", "arguments"), [*commands()])
def test_commands_and_options_exist(where: str, arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    words = [*arguments]
    context: Any = None
    while isinstance(command, TyperGroup) and words:
        found = command.get_command(context, words[0])
        if found is None:
            break
        command = found
        del words[0]
    assert not isinstance(command, TyperGroup) or words[0].startswith("-"), where
    command.make_parser(command.context_class(command)).parse_args(
        words
    )  # of an option that is not there: an error
