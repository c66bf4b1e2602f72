"""What has to be fast needs no torch: help, a dry run, a conversion without validation."""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import speculators
from dflash import GOLDEN_FAMILIES, PLAIN, SELECTING
from dflash import TARGET as DFLASH_TARGET
from eagle3 import GOLDEN3, TARGET
from helpers import entries, write_checkpoint
from light_process import LightProcess
from mtp_verifiers import write_verifier

HEAVY = ("torch", "transformers", "numpy")
OF_VLLM = {"speculators.integrations.vllm.draft", "speculators.integrations.vllm.plain"}
"""Models made of vLLM's classes, which only vLLM imports."""
OF_TRITON = {"speculators.decode.gpu.kernels"}
"""Kernels, which are only imported where Triton is installed."""
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(speculators.__path__, "speculators.")
    if module.name not in OF_VLLM | OF_TRITON
)


LIGHT = [
    module
    for module in MODULES
    if module.split(".")[1]
    in {
        "format",
        "families",
        "checkpoint",
        "cli",
        "errors",
        "comparison",
        "convert",
        "inspection",
        "mtp",
        "batch",
        "publish",
        "integrations",
    }
    # Validation needs the model, and so does running drafts to compare them.
    and not module.startswith(
        (
            "speculators.comparison.computation",
            "speculators.convert.references.",
            "speculators.convert.checks.",
        )
    )
]

MAIN = "from speculators.cli import main; main()"


LoadedAfter = Callable[..., tuple[int, set[str]]]


@pytest.fixture(scope="module")
def process() -> Iterator[LightProcess]:
    with LightProcess.start(HEAVY, LIGHT) as process:
        yield process


@pytest.fixture
def loaded_after(process: LightProcess) -> LoadedAfter:
    """Runs code; returns its exit status, and which of ``HEAVY`` it loaded."""

    def run(code: str, *arguments: str, cwd: Path | None = None) -> tuple[int, set[str]]:
        outcome = process.run(code, *arguments, cwd=cwd)
        return outcome.status, {*outcome.loaded}

    return run


def test_importing_what_is_light_loads_nothing_else(process: LightProcess) -> None:
    assert [(it.status, it.loaded) for it in process.imports] == [(0, [])] * 2


def test_this_test_sees_what_is_loaded(loaded_after: LoadedAfter) -> None:
    assert loaded_after("import numpy; raise SystemExit(3)") == (3, {"numpy"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["convert", "eagle", "--help"],
        ["convert", "eagle3", "--help"],
        ["convert", "dflash", "--help"],
        ["convert", "auto", "--help"],
        ["evaluate", "--help"],
        ["record", "--help"],
        ["export", "--help"],
        ["mtp", "cut", "--help"],
        ["mtp", "graft", "--help"],
        ["batch", "--help"],
        ["diff", "--help"],
        ["-h"],
        ["validate", "--help"],
    ],
    ids=" ".join,
)
def test_the_command_line_answers_without_torch(
    loaded_after: LoadedAfter, arguments: list[str]
) -> None:
    assert loaded_after(MAIN, *arguments) == (0, set())


def test_help_imports_little() -> None:
    """It has at most 1.5 times the CPU time of importing typer, rich.console and loguru."""
    heavy = ("loguru", "huggingface_hub", "speculators.families.registry", "safetensors")
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {heavy} if m in sys.modules]))\n{MAIN}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_refused_without_torch(loaded_after: LoadedAfter) -> None:
    assert loaded_after(MAIN, "transmogrify") == (2, set())


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("option", ["--no-validate", "--dry-run"])
def test_a_conversion_without_validation_needs_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, verifier: Path, container: str, option: str
) -> None:
    source = write_checkpoint(tmp_path / "source", container=container)
    arguments = ["convert", "eagle", str(source), "out", str(verifier), option]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (0, set())
    assert ("out/model.safetensors" in entries(tmp_path)) == (option == "--no-validate")


def test_an_eagle3_draft_needs_no_torch(loaded_after: LoadedAfter, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN3 / "modelopt_4aux" / name)  # t2d is derived
    arguments = ["convert", "auto", str(tmp_path), "out", str(TARGET), "--no-validate"]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (0, set())
    for command in (["inspect", "out"], ["export", "out", "modelopt", "--to", "modelopt"]):
        assert loaded_after(MAIN, *command, cwd=tmp_path) == (0, set())


@pytest.mark.parametrize("name", [PLAIN, SELECTING])
def test_a_dflash_draft_needs_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, name: str
) -> None:
    source = GOLDEN_FAMILIES / name
    arguments = ["convert", "auto", str(source), "out", str(DFLASH_TARGET), "--no-validate"]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (0, set())
    for command in (["inspect", "out"], ["export", "out", "native", "--to", "dflash"]):
        assert loaded_after(MAIN, *command, cwd=tmp_path) == (0, set())


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_inspecting_needs_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, container: str, options: list[str]
) -> None:
    source = write_checkpoint(tmp_path / "source", container=container)
    assert loaded_after(MAIN, "inspect", str(source), *options) == (0, set())


def test_inspecting_a_converted_draft_needs_no_torch(
    loaded_after: LoadedAfter, converted: dict[str, Path]
) -> None:
    for directory in converted.values():
        assert loaded_after(MAIN, "inspect", str(directory)) == (0, set())


def test_the_doctor_needs_no_torch(loaded_after: LoadedAfter) -> None:
    status, loaded = loaded_after(MAIN, "doctor")
    assert status in {0, 1}  # it may have found something
    assert loaded == set()


def test_rounding_needs_numpy_and_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, verifier: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    arguments = ["convert", "eagle", str(source), "out", str(verifier), "--no-validate", "--dtype"]
    assert loaded_after(MAIN, *arguments, "bfloat16", cwd=tmp_path) == (0, {"numpy"})


def test_an_export_needs_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, converted: dict[str, Path]
) -> None:
    arguments = ["export", str(converted["llama31_gqa_nobias"]), "out", "--to", "sglang"]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (0, set())
    assert "out/model.safetensors" in entries(tmp_path)


def test_cutting_and_grafting_need_no_torch(loaded_after: LoadedAfter, tmp_path: Path) -> None:
    write_verifier(tmp_path / "verifier")
    assert loaded_after(MAIN, "mtp", "cut", "verifier", "mtp", cwd=tmp_path) == (0, set())
    assert loaded_after(MAIN, "inspect", "verifier", cwd=tmp_path) == (0, set())
    # numpy finds numbers that are none.
    arguments = ["mtp", "graft", "verifier", "mtp", "out"]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (0, {"numpy"})


def test_comparing_needs_no_torch(
    loaded_after: LoadedAfter, tmp_path: Path, converted: dict[str, Path]
) -> None:
    """Nor numpy, where all bytes are the same."""
    draft = converted["llama31_gqa_nobias"]
    source = write_checkpoint(tmp_path / "source", container="pytorch_model.bin")
    assert loaded_after(MAIN, "diff", str(source), str(draft)) == (0, set())
    other = write_checkpoint(tmp_path / "other", edit=lambda it: it["fc.weight"].fill_(1))
    assert loaded_after(MAIN, "diff", str(other), str(draft)) == (1, {"numpy"})


def test_an_error_needs_no_torch(loaded_after: LoadedAfter, tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source", edit=lambda tensors: tensors.pop("fc.weight"))
    arguments = ["convert", "eagle", str(source), "out", str(verifier)]
    assert loaded_after(MAIN, *arguments, cwd=tmp_path) == (1, set())


def test_a_report_is_read_and_shown_without_torch(
    loaded_after: LoadedAfter, tmp_path: Path
) -> None:
    modules = (
        *("evaluate.files", "evaluate.subject.opening", "evaluate.plots", "evaluate.prompts"),
        *("evaluate.recording.manifest", "evaluate.server.evaluation", "cli.report_view"),
    )
    code = "import " + ", ".join(f"speculators.{module}" for module in modules)
    assert loaded_after(code) == (0, set())
    assert loaded_after(MAIN, "evaluate", "draft", "--prompts", "none.jsonl", cwd=tmp_path) == (
        1,
        set(),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=abacus"], "torch has no such kind"),
        (["--proposal=static_tree", "--num-draft-tokens=3"], "The static tree has 25 tokens"),
        (["--verifier=none/such/verifier"], "does not exist"),
        (["--num-draft-tokens=few"], "neither a number of tokens"),
        (["--recording=none"], "recording.json cannot be read"),
    ],
)
def test_a_wrong_argument_of_evaluate_is_told_without_torch(
    process: LightProcess, converted: dict[str, Path], options: list[str], message: str
) -> None:
    draft = str(converted["llama31_gqa_nobias"])
    outcome = process.run(MAIN, "evaluate", draft, *options)
    assert outcome.status in {1, 2}
    assert not outcome.loaded
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


def test_an_unconverted_draft_is_told_without_torch(process: LightProcess, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    outcome = process.run(MAIN, "evaluate", str(source))
    assert (outcome.status, outcome.loaded) == (1, [])
    assert "Convert the checkpoint first" in outcome.stderr


def imported_alone() -> dict[str, list[str]]:
    """Module → what of ``HEAVY`` is loaded by importing it in a forked process of its own.

    To save time, some packages that are light are loaded beforehand and, for the modules outside
    ``LIGHT``, torch, transformers and all of ``LIGHT``, which cannot import them in turn.
    """
    script = """
import importlib, json, os, sys
import loguru, packaging.version, pydantic, rich.console, rich.table, typer, yaml
import concurrent.futures, csv, ctypes, email.message, hashlib, hmac, multiprocessing, pickletools
import secrets, tempfile, zipfile
class Loads(pydantic.BaseModel): what_it_takes: dict[str, list[int] | None] = {}
heavy, light, others = json.loads(sys.argv[1])
def report(modules):
    for module in modules:
        if os.fork() == 0:
            importlib.import_module(module)
            print(json.dumps([module, [m for m in heavy if m in sys.modules]]), flush=True)
            os._exit(0)
        os.wait()
report(light)
for module in light:
    importlib.import_module(module)
import torch, transformers.generation
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
report(others)
"""
    others = sorted(set(MODULES) - set(LIGHT))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([HEAVY, LIGHT, others])],
        check=False,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_all_other_modules_can_be_imported() -> None:
    """Here, where torch is; that no two import each other is up to ``test_architecture``."""
    for module in set(MODULES) - set(LIGHT):
        importlib.import_module(module)


@pytest.mark.exhaustive
def test_every_module_imports_on_its_own() -> None:
    """Each in a process of its own."""
    found = imported_alone()
    assert found.keys() == {*MODULES}
    assert {module: found[module] for module in LIGHT if found[module]} == {}


def test_there_are_modules_of_both_kinds() -> None:
    assert "speculators.checkpoint.files.torch_file" in LIGHT
    assert "speculators.models.eagle" in MODULES
    assert len(LIGHT) > 20
