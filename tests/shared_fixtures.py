"""Fixtures for the tests of the conversion and the model."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from loguru import logger
from transformers.utils import logging as transformers_logging

from all_drafts import Pair, convert_all
from eagle3 import NAMES, convert_golden3
from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    CommandLine,
    Run,
    golden_vectors,
    save_quietly,
    source_tensors,
    tiny_llama,
)
from speculators.cli import main
from speculators.convert.eagle import EagleConverter

transformers_logging.disable_progress_bar()
# The matrices are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Only a power failure needs it, and a disk takes milliseconds for each of some ten thousand calls.
# The processes that tests start do call it.
os.fsync = lambda _: None  # type: ignore[assignment]


# The same examples every time, however slow the machine is; random ones are up to the fuzzer.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each golden checkpoint, a tiny Llama with its head but another embedding."""
    root = tmp_path_factory.mktemp("verifiers")
    return {
        name: save_quietly(tiny_llama(golden_vectors(name)["lm_head.weight"]), root / name)
        for name in GOLDEN_NAMES
    }


@pytest.fixture(scope="session")
def verifier(verifiers: dict[str, Path]) -> Path:
    """The verifier of the plain golden checkpoint."""
    return verifiers[PLAIN]


@pytest.fixture(scope="session")
def converted(
    tmp_path_factory: pytest.TempPathFactory, verifiers: dict[str, Path]
) -> dict[str, Path]:
    """Every golden checkpoint, converted with validation; tests must not change these."""
    root = tmp_path_factory.mktemp("converted")
    return {
        name: EagleConverter().convert(GOLDEN / name, root / name, verifiers[name])
        for name in GOLDEN_NAMES
    }


@pytest.fixture(scope="session")
def eagle3_drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every golden EAGLE-3 draft, converted with validation; tests must not change these."""
    root = tmp_path_factory.mktemp("eagle3")
    return {name: convert_golden3(name, root / name) for name in NAMES}


@pytest.fixture(scope="session")
def all_drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Every golden and example draft, converted without validation; tests must not change these."""
    return convert_all(tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="session")
def own_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verifier whose embedding is the plain golden checkpoint's own."""
    model = tiny_llama(
        golden_vectors(PLAIN)["lm_head.weight"], source_tensors(PLAIN)["embed_tokens.weight"]
    )
    return save_quietly(model, tmp_path_factory.mktemp("own") / "verifier")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged during a test, as ``LEVEL message``."""
    lines: list[str] = []

    def keep(message: str) -> None:
        lines.append(message.removesuffix("\n"))

    handler = logger.add(keep, level="DEBUG", format="{level} {message}")
    yield lines
    logger.remove(handler)


@pytest.fixture
def speculators(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """The command line's ``main`` in this process."""

    def run(*arguments: str | Path) -> Run:
        monkeypatch.setattr(sys, "argv", ["speculators", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        captured = capfd.readouterr()
        return Run(status, captured.out, captured.err)

    yield run
    logger.remove()
