"""Errors are reported as one sentence, and leave nothing behind."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    GOLDEN,
    PLAIN,
    CommandLine,
    Edit,
    Run,
    Tensors,
    entries,
    golden_vectors,
    run_process,
    save_quietly,
    source_tensors,
    tiny_llama,
    write_checkpoint,
)
from speculators.convert.eagle import EagleConverter
from speculators.errors import (
    CheckpointError,
    ConversionError,
    UnsafeCheckpointError,
    ValidationError,
    VerifierError,
)

convert = EagleConverter().convert


@dataclass(frozen=True)
class Setting:
    """What the command is given; each case below spoils a part of it."""

    source: Path
    output: Path
    verifier: Path

    @property
    def config(self) -> Path:
        return self.source / "config.json"

    @property
    def weights(self) -> Path:
        return self.source / "model.safetensors"


@pytest.fixture
def setting(tmp_path: Path, verifier: Path) -> Setting:
    source = write_checkpoint(tmp_path / "source")
    shutil.copytree(verifier, tmp_path / "verifier")
    return Setting(source, tmp_path / "output", tmp_path / "verifier")


def with_config(**keys: Any) -> Callable[[Setting], None]:
    def spoil(setting: Setting) -> None:
        config = json.loads(setting.config.read_text()) | keys
        setting.config.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return spoil


def with_tensors(edit: Callable[[Tensors], object]) -> Callable[[Setting], None]:
    def spoil(setting: Setting) -> None:
        shutil.rmtree(setting.source)
        write_checkpoint(setting.source, edit=edit)

    return spoil


def with_verifier(**sizes: Any) -> Callable[[Setting], None]:
    def spoil(setting: Setting) -> None:
        shutil.rmtree(setting.verifier)
        save_quietly(tiny_llama(**sizes), setting.verifier)

    return spoil


def a_draft_as_verifier(setting: Setting) -> None:
    shutil.rmtree(setting.verifier)
    write_checkpoint(setting.verifier)


def the_draft_as_verifier(setting: Setting) -> None:
    shutil.rmtree(setting.verifier)
    setting.verifier.symlink_to(setting.source)


def with_output(write: Callable[[Path], object]) -> Callable[[Setting], object]:
    return lambda setting: write(setting.output)


def a_full_directory(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")


def as_eagle_3(tensors: Tensors) -> None:
    tensors["d2t"] = torch.arange(320)
    tensors["fc.weight"] = torch.zeros(64, 192)


def truncated(setting: Setting) -> None:
    setting.weights.write_bytes(setting.weights.read_bytes()[:-1000])


def damaged_header(setting: Setting) -> None:
    data = bytearray(setting.weights.read_bytes())
    data[8:12] = b"}}}}"
    setting.weights.write_bytes(data)


def head_of_another(setting: Setting) -> None:
    with_tensors(lambda t: t.update({"lm_head.weight": torch.ones(320, 64)}))(setting)


def a_file_as_input(setting: Setting) -> None:
    shutil.rmtree(setting.source)
    setting.source.write_text("x")


def a_whole_model(setting: Setting) -> None:
    shutil.rmtree(setting.source)
    shutil.copytree(setting.verifier, setting.source)


def unreadable_config(setting: Setting) -> None:
    """A file that exists but cannot be read, even by root."""
    setting.config.unlink()
    setting.config.symlink_to("/proc/self/mem")


ERRORS: dict[str, tuple[Callable[[Setting], object], str]] = {
    "missing input": (lambda s: shutil.rmtree(s.source), r"source does not exist"),
    "input is a file": (
        a_file_as_input,
        r"source is a file; give the directory",
    ),
    "no config.json": (lambda s: s.config.unlink(), r"source has no config\.json"),
    "no weights": (lambda s: s.weights.unlink(), r"source has no weights: none of model\.safet"),
    "bad JSON": (lambda s: s.config.write_text('{"a": '), r"config\.json is not valid JSON"),
    "binary config": (lambda s: s.config.write_bytes(b"\xff\xfe\x00"), r"is not valid JSON"),
    "a config in UTF-16": (
        lambda s: s.config.write_text(s.config.read_text(), encoding="utf-16"),
        r"config\.json is not valid JSON, but UTF-16; save it as UTF-8\.$",
    ),
    "a config in Latin-1": (
        lambda s: s.config.write_bytes(b'{"note": "\xe4"}'),
        r"since its byte 10 is not UTF-8; save it as UTF-8, or fetch it again\.$",
    ),
    "JSON list": (lambda s: s.config.write_text("[]"), r"config\.json does not hold a JSON object"),
    "endless nesting": (lambda s: s.config.write_text("[" * 200_000), r"is not valid JSON"),
    "config without sizes": (
        with_config(hidden_size=..., vocab_size=...),
        r"config\.json lacks hidden_size, vocab_size",
    ),
    "size of another type": (with_config(hidden_size="big"), r"key hidden_size: "),
    "no heads": (with_config(num_attention_heads=0), r"key num_attention_heads: "),
    "uneven heads": (with_config(num_key_value_heads=3), r"4 attention heads cannot share 3"),
    "odd heads": (
        with_config(num_attention_heads=64, num_key_value_heads=32),
        r"RoPE needs an even size",
    ),
    "eps is not a number": (with_config(rms_norm_eps=float("nan")), r"key rms_norm_eps: "),
    "nothing but zeros": (
        with_tensors(lambda tensors: [it.zero_() for it in tensors.values()]),
        r"gives nothing but zeros, so the source's weights were never filled",
    ),
    "eps is a word": (with_config(rms_norm_eps="small"), r"key rms_norm_eps: "),
    "theta is a word": (with_config(rope_theta="high"), r"key rope_theta: "),
    "theta is 0": (with_config(rope_theta=0), r"key rope_theta: "),
    "theta is negative": (with_config(rope_theta=-1e4), r"key rope_theta: "),
    "scaling is a word": (with_config(rope_scaling="linear"), r"key rope_scaling: 'linear'"),
    "scaling is a list": (with_config(rope_scaling=[2]), r"key rope_scaling: \[2\]"),
    "unknown scaling": (with_config(rope_scaling={"type": "su"}), r"the type 'su' is not known"),
    "scaling type is a list": (
        with_config(rope_scaling={"type": [1]}),
        r"type: \[1\] is not a single value",
    ),
    "scaling without factor": (with_config(rope_scaling={"type": "linear"}), r"needs factor"),
    "scaling by 0": (with_config(rope_scaling={"type": "linear", "factor": 0}), r"needs factor"),
    "scaling by a word": (
        with_config(rope_scaling={"type": "dynamic", "factor": "2"}),
        r"needs factor, a number over 0; found '2'",
    ),
    "llama3 scaling in part": (
        with_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        r"llama3 needs low_freq_factor",
    ),
    "unknown activation": (with_config(hidden_act="sine"), r"key hidden_act: 'sine'"),
    "truncated file": (truncated, r"model\.safetensors is truncated"),
    "damaged header": (damaged_header, r"model\.safetensors is not a safetensors file"),
    "missing tensor": (
        with_tensors(lambda t: t.pop("layers.0.mlp.up_proj.weight")),
        r"lacks layers\.0\.mlp\.up_proj\.weight",
    ),
    "several missing tensors": (
        with_tensors(lambda t: (t.pop("fc.weight"), t.pop("layers.0.mlp.up_proj.weight"))),
        r"lacks fc\.weight, layers\.0\.mlp\.up_proj\.weight",
    ),
    "some of a feature's tensors": (
        with_tensors(lambda t: t.update({"embed_layernorm.weight": torch.ones(64)})),
        r"lacks hidden_layernorm\.weight, lm_head_layernorm\.weight",
    ),
    "unknown tensor": (
        with_tensors(lambda t: t.update({"layers.0.mlp.mystery": torch.ones(1)})),
        r"unknown layers\.0\.mlp\.mystery",
    ),
    "bias on o": (
        with_tensors(lambda t: t.update({"layers.0.self_attn.o_proj.bias": torch.ones(64)})),
        r"unknown layers\.0\.self_attn\.o_proj\.bias",
    ),
    "a tensor twice": (
        with_tensors(lambda t: t.update({"model.fc.weight": t["fc.weight"] + 1})),
        r"has (model\.)?fc\.weight and (model\.)?fc\.weight",
    ),
    "wrong shape": (
        with_tensors(lambda t: t.update({"fc.weight": torch.ones(64, 127)})),
        r"fc\.weight has the shape \(64, 127\).*should have \(64, 128\)",
    ),
    "transposed": (
        with_tensors(lambda t: t.update({"fc.weight": t["fc.weight"].T.contiguous()})),
        r"fc\.weight has the shape \(128, 64\)",
    ),
    "config of another draft": (
        with_config(intermediate_size=352),
        r"mlp\.\w+_proj\.weight has the shape",
    ),
    "EAGLE-3": (with_tensors(as_eagle_3), r"an EAGLE-3 draft \(it has d2t\)"),
    "EAGLE-3 by its fc alone": (
        with_tensors(lambda t: t.update({"fc.weight": torch.zeros(64, 192)})),
        r"an EAGLE-3 draft \(fc\.weight \(64, 192\) takes 3 hidden sizes\)",
    ),
    "two layers": (
        with_tensors(lambda t: t.update({"layers.1.mlp.up_proj.weight": torch.ones(176, 64)})),
        r"a draft of several layers \(it has layers\.1\.mlp\.up_proj\.weight\)",
    ),
    "quantized by tensors": (
        with_tensors(lambda t: t.update({"fc.qweight": torch.ones(1)})),
        r"quantized weights \(it has fc\.qweight\)",
    ),
    "quantized by type": (
        with_tensors(lambda t: t.update({"fc.weight": torch.ones(64, 128, dtype=torch.int8)})),
        r"fc\.weight has the type I8",
    ),
    "a whole model": (
        a_whole_model,
        r"a whole language model",
    ),
    "converted already": (
        with_config(speculators_model_type="eagle"),
        r"a draft in the speculators format \(.*it is converted already",
    ),
    "values that are not finite": (
        with_tensors(lambda t: t["fc.weight"].fill_(torch.nan)),
        r"fc\.weight has values that are not finite",
    ),
    "overflow in the forward pass": (
        with_tensors(lambda t: t["layers.0.mlp.down_proj.weight"].fill_(3e38)),
        r"The forward pass gives values that are not finite",
    ),
    "head of another verifier": (head_of_another, r"lm_head\.weight that is not the verifier's"),
    "missing verifier": (
        lambda s: shutil.rmtree(s.verifier),
        r"The verifier cannot be read: .*verifier does not exist",
    ),
    "verifier without config": (
        lambda s: (s.verifier / "config.json").unlink(),
        r"The verifier cannot be read: .*has no config\.json",
    ),
    "verifier with bad JSON": (
        lambda s: (s.verifier / "config.json").write_text("{"),
        r"The verifier cannot be read: .*not valid JSON",
    ),
    "verifier with an empty config": (
        lambda s: (s.verifier / "config.json").write_text("{}"),
        r"does not give hidden_size, vocab_size and architectures",
    ),
    "verifier with odd architectures": (
        lambda s: (s.verifier / "config.json").write_text(
            '{"hidden_size": 64, "vocab_size": 320, "architectures": "LlamaForCausalLM"}'
        ),
        r"does not give hidden_size, vocab_size and architectures",
    ),
    "verifier that is a draft": (
        lambda s: (s.verifier / "config.json").write_text('{"speculators_model_type": "eagle"}'),
        r"is a draft in the speculators format itself",
    ),
    "verifier that is a draft, not converted": (
        a_draft_as_verifier,
        r"verifier holds an EAGLE-1 or EAGLE-2 draft; give the language model",
    ),
    "verifier that is the draft itself": (
        the_draft_as_verifier,
        r"verifier is given as the draft and as its verifier",
    ),
    "verifier of another hidden size": (with_verifier(hidden_size=128), r"hidden size is 64"),
    "verifier of another vocabulary": (with_verifier(vocab_size=100), r"vocabulary is 320"),
    "output exists": (with_output(a_full_directory), r"output exists; choose another output"),
    "output is a file": (
        with_output(lambda path: path.write_text("mine")),
        r"output exists and is not a directory",
    ),
    "output is a dangling link": (
        with_output(lambda path: path.symlink_to("nowhere")),
        r"output exists and is not a directory",
    ),
    "config that cannot be read": (unreadable_config, r"Input/output error|Errno"),
}


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        name: (directory / name).read_bytes()
        if (directory / name).is_file() and not (directory / name).is_symlink()
        else None
        for name in entries(directory)
    }


def check_told(run: Run, pattern: str) -> None:
    assert run.status == 1
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert len(run.errors) == 1, run.stderr
    assert re.search(pattern, run.errors[0]), run.errors[0]
    assert run.stderr.rstrip("\n").endswith(run.errors[0])  # nothing after it
    assert run.errors[0].endswith(".")
    assert len(run.errors[0]) < 600 + 4 * len(str(Path.cwd()))


@pytest.mark.parametrize(("spoil", "pattern"), ERRORS.values(), ids=ERRORS.keys())
def test_one_sentence_status_1_and_nothing_left_behind(
    tmp_path: Path,
    setting: Setting,
    speculators: CommandLine,
    spoil: Callable[[Setting], object],
    pattern: str,
) -> None:
    spoil(setting)
    before = contents(tmp_path)
    run = speculators("convert", "eagle", setting.source, setting.output, setting.verifier)
    check_told(run, pattern)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("case", "option"),
    [
        ("wrong shape", "--no-validate"),
        ("wrong shape", "--overwrite"),
        ("wrong shape", "--dry-run"),
        ("truncated file", "--no-validate"),
        ("truncated file", "--dry-run"),
        ("output exists", "--no-validate"),
    ],
)
def test_the_same_with_other_options(
    tmp_path: Path, setting: Setting, speculators: CommandLine, case: str, option: str
) -> None:
    spoil, pattern = ERRORS[case]
    spoil(setting)
    before = contents(tmp_path)
    check_told(
        speculators("convert", "eagle", setting.source, setting.output, setting.verifier, option),
        pattern,
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", ["output exists", "output is a file", "output is a dangling link"])
def test_overwrite_does_not_replace_what_is_no_converted_checkpoint(
    tmp_path: Path, setting: Setting, speculators: CommandLine, case: str
) -> None:
    ERRORS[case][0](setting)
    before = contents(tmp_path)
    run = speculators(
        "convert", "eagle", setting.source, setting.output, setting.verifier, "--overwrite"
    )
    check_told(run, "not a converted checkpoint|not a directory")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "case",
    [
        "EAGLE-3",
        "truncated file",
        pytest.param("values that are not finite", marks=pytest.mark.exhaustive),
    ],
)
def test_a_failing_process(tmp_path: Path, setting: Setting, case: str) -> None:
    """Exhaustive: also one that has loaded torch."""
    spoil, pattern = ERRORS[case]
    spoil(setting)
    before = contents(tmp_path)
    check_told(
        run_process("convert", "eagle", setting.source, setting.output, setting.verifier), pattern
    )
    assert contents(tmp_path) == before


def test_debug_shows_the_traceback(tmp_path: Path, setting: Setting) -> None:
    truncated(setting)
    run = run_process(
        "convert", "eagle", setting.source, setting.output, setting.verifier, "--debug"
    )
    assert run.status == 1
    assert "Traceback (most recent call last)" in run.stderr
    assert "CheckpointError: " in run.stderr
    assert not setting.output.exists()


@pytest.mark.parametrize("flag", ["--layernorms", "--fusion-bias"])
def test_a_flag_against_the_tensors(
    tmp_path: Path, setting: Setting, speculators: CommandLine, flag: str
) -> None:
    before = contents(tmp_path)
    run = speculators("convert", "eagle", setting.source, setting.output, setting.verifier, flag)
    check_told(run, flag.removeprefix("--").replace("-", ".") + " asks for")
    assert contents(tmp_path) == before


def test_output_equal_to_input(tmp_path: Path, setting: Setting, speculators: CommandLine) -> None:
    before = contents(tmp_path)
    for output in (setting.source, setting.source / ".", setting.source / ".." / "source"):
        for more in ((), ("--overwrite",)):
            run = speculators("convert", "eagle", setting.source, output, setting.verifier, *more)
            check_told(run, "is the input too")
    assert contents(tmp_path) == before


def test_a_converted_output_stays_when_its_replacement_fails(
    tmp_path: Path, setting: Setting, speculators: CommandLine
) -> None:
    arguments = ("convert", "eagle", setting.source, setting.output, setting.verifier)
    assert speculators(*arguments).status == 0
    with_tensors(lambda t: t["fc.weight"].fill_(torch.nan))(setting)
    before = contents(tmp_path)
    check_told(speculators(*arguments, "--overwrite"), "not finite")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", ["values that are not finite", "wrong shape"])
def test_new_parent_directories_go_with_a_failure(
    tmp_path: Path, setting: Setting, speculators: CommandLine, case: str
) -> None:
    spoil, pattern = ERRORS[case]
    spoil(setting)
    before = contents(tmp_path)
    output = tmp_path / "new" / "and" / "deep" / "output"
    check_told(speculators("convert", "eagle", setting.source, output, setting.verifier), pattern)
    assert contents(tmp_path) == before


def test_a_file_where_a_parent_directory_should_be(
    tmp_path: Path, setting: Setting, speculators: CommandLine
) -> None:
    output = setting.config / "output"
    before = contents(tmp_path)
    check_told(
        speculators("convert", "eagle", setting.source, output, setting.verifier), "cannot be made"
    )
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(
    tmp_path: Path, setting: Setting, speculators: CommandLine
) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    run = speculators("convert", "eagle", setting.source, parent / "out", setting.verifier)
    check_told(run, "cannot be made: Permission denied")
    assert entries(parent) == []


def test_a_file_system_that_takes_no_directory(setting: Setting, speculators: CommandLine) -> None:
    run = speculators("convert", "eagle", setting.source, "/proc/output", setting.verifier)
    check_told(run, r"/proc/output cannot be made: ")


def test_a_name_that_no_file_system_takes(setting: Setting, speculators: CommandLine) -> None:
    too_long = "a" * 300
    check_told(
        speculators("convert", "eagle", too_long, setting.output, setting.verifier), "too long"
    )
    check_told(
        speculators("convert", "eagle", setting.source, too_long, setting.verifier), "too long"
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_disk_that_fails_while_writing(
    tmp_path: Path,
    setting: Setting,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    overwrite: bool,
) -> None:
    arguments = ("convert", "eagle", setting.source, setting.output, setting.verifier)
    if overwrite:
        assert speculators(*arguments).status == 0
        arguments = (*arguments, "--overwrite")  # type: ignore[assignment]
    before = contents(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    check_told(speculators(*arguments), os.strerror(code))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "eagle"],
        ["convert", "eagle", "source", "output"],
        ["convert", "eagle", "source", "output", "verifier", "--bogus"],
        ["convert", "eagle", "source", "output", "verifier", "another"],
        ["convert", "falcon", "source", "output", "verifier"],
        ["transmogrify"],
        ["convert", "eagle", "source", "output", "verifier", "--revision"],
    ],
    ids=" ".join,
)
def test_usage_errors_have_status_2(
    tmp_path: Path,
    setting: Setting,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    run = speculators(*arguments)
    assert run.status == 2
    assert "Traceback" not in run.stderr
    assert "Error" in run.stderr
    assert contents(tmp_path) == before


IMPORTED = "sys.modules['speculators.models.loading'] = stand_in\n"


def validating(function: str, *, importing: bool = False) -> str:
    """A program that is the command line, with a function that stands in for the validation.

    Unless ``importing``, it does not import meanwhile what a validation needs.
    """
    return (
        "import os, signal, sys, time, types\n"
        f"{function}"
        "stand_in = types.SimpleNamespace(validate_conversion=validate_conversion)\n"
        "sys.modules['speculators.convert.validation'] = stand_in\n"
        f"{'' if importing else IMPORTED}"
        "from speculators.__main__ import run; run()\n"
    )


@pytest.mark.parametrize("importing", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, setting: Setting, importing: bool
) -> None:
    """Press Ctrl-C during validation, where the process waits for it.

    Exhaustive: while a thread imports torch.
    """
    script = validating(
        "def validate_conversion(*_, **__):\n    print('here', flush=True)\n    time.sleep(60)\n",
        importing=importing,
    )
    before = contents(tmp_path)
    output = tmp_path / "new" / "output"
    with subprocess.Popen(
        [sys.executable, "-c", script, "convert", "eagle"]
        + [str(path) for path in (setting.source, output, setting.verifier)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        during = entries(tmp_path)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert any(".output.speculators-" in name for name in during)
    assert "new/output" not in during
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert contents(tmp_path) == before


def test_a_killed_run_leaves_a_sibling_that_the_next_run_removes(
    tmp_path: Path, setting: Setting, speculators: CommandLine
) -> None:
    script = validating(
        "def validate_conversion(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    output = tmp_path / "out [1]"  # brackets mean something to globs
    arguments = [str(path) for path in (setting.source, output, setting.verifier)]
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", "eagle", *arguments], check=False
    )
    assert done.returncode == -signal.SIGKILL
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(leftovers) == 1
    assert not output.exists()
    assert speculators("convert", "eagle", *arguments).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out [1]", "source", "verifier"]


# In Python: the error's type, and that a refused conversion writes nothing


@pytest.mark.parametrize(
    "name", [name for name in source_tensors() if name != "embed_tokens.weight"]
)
@pytest.mark.parametrize("validate", [True, False])
def test_without_one_of_its_tensors_a_checkpoint_is_refused(
    tmp_path: Path, verifier: Path, name: str, validate: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=lambda tensors: tensors.pop(name))
    with pytest.raises(ConversionError, match=name):
        convert(source, tmp_path / "out", verifier, validate=validate)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


def test_a_checkpoint_with_none_of_the_names_is_refused(tmp_path: Path, verifier: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"encoder.{name}"] = tensors.pop(name)
        tensors["bridge.weight"] = torch.ones(4)

    source = write_checkpoint(tmp_path / "source", edit=rename)
    with pytest.raises(ConversionError, match=r"not a checkpoint of a known kind.*encoder\."):
        convert(source, tmp_path / "out", verifier)


def test_a_second_layer_is_refused(tmp_path: Path, verifier: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["layers.1.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].clone()

    source = write_checkpoint(tmp_path / "source", edit=add)
    with pytest.raises(ConversionError, match=r"several layers.*layers\.1\.mlp\.up_proj"):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.up_proj.weight_scale",
        "layers.0.mlp.up_proj.qweight",
        "layers.0.self_attn.q_proj.scales",
        "fc.weight.absmax",
    ],
)
def test_quantization_scales_are_refused(tmp_path: Path, verifier: Path, name: str) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({name: torch.ones(1)})
    )
    with pytest.raises(ConversionError, match=r"quantized.*" + name.replace(".", r"\.")):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight"])
def test_a_tensor_of_another_type_is_refused(
    tmp_path: Path, verifier: Path, dtype: torch.dtype, name: str
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = golden_vectors(PLAIN)["lm_head.weight"]
        tensors[name] = tensors[name].to(dtype)

    source = write_checkpoint(tmp_path / "source", edit=edit)
    with pytest.raises(ConversionError, match=f"{name} has the type"):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize("flag", ["fusion_bias", "layernorms"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_flag_for_a_feature_without_tensors_is_refused(
    tmp_path: Path, verifier: Path, flag: str, validate: bool
) -> None:
    source = write_checkpoint(tmp_path / "source")
    flags: dict[str, Any] = {flag: True}
    with pytest.raises(ConversionError, match=flag):
        convert(source, tmp_path / "out", verifier, validate=validate, **flags)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_the_verifiers_is_refused(tmp_path: Path, verifier: Path) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].clone()
    head[17, 3] += 0.5
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({"lm_head.weight": head})
    )
    with pytest.raises(ValidationError, match=r"lm_head\.weight"):
        convert(source, tmp_path / "out", verifier)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 128}, r"hidden size is 64, but the verifier's is 128"),
        ({"vocab_size": 321}, r"vocabulary is 320, but the verifier's is 321"),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_verifier_of_other_sizes_is_refused(
    tmp_path: Path, sizes: dict[str, Any], words: str, validate: bool
) -> None:
    verifier = save_quietly(tiny_llama(**sizes), tmp_path / "verifier")
    source = write_checkpoint(tmp_path / "source")
    with pytest.raises(VerifierError, match=words):
        convert(source, tmp_path / "out", verifier, validate=validate)
    assert not (tmp_path / "out").exists()


def with_value(name: str, index: Any, value: float) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[name][index] = value

    return edit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("fc.weight", (0, 0)),
        ("layers.0.mlp.down_proj.weight", (63, 175)),
        ("embed_tokens.weight", 319),
        ("embed_tokens.weight", (0, 5)),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, verifier: Path, name: str, index: Any, value: float
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=with_value(name, index, value))
    with pytest.raises(ValidationError, match=rf"{name} has values that are not finite"):
        convert(source, tmp_path / "out", verifier)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


def test_a_verifier_with_nans_in_its_head_is_blamed_itself(tmp_path: Path) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].clone()
    head[3] = math.nan
    verifier = save_quietly(tiny_llama(head), tmp_path / "verifier")
    with pytest.raises(ValidationError, match=r"the verifier .* is damaged"):
        convert(write_checkpoint(tmp_path / "source"), tmp_path / "out", verifier)
    assert not (tmp_path / "out").exists()


SIZE = (GOLDEN / PLAIN / "model.safetensors").stat().st_size


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 1500, SIZE // 2, -64, -8, -1])
def test_a_truncated_file_is_told_in_a_sentence(
    tmp_path: Path, verifier: Path, container: str, kept: int
) -> None:
    source = write_checkpoint(tmp_path / "source", container=container)
    file = source / container
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=container) as caught:
        convert(source, tmp_path / "out", verifier, validate=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "out").exists()


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, verifier: Path, legacy: bool) -> None:
    source, canary = write_checkpoint(tmp_path / "source"), tmp_path / "canary"
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(
        source_tensors() | {"x": Malicious(canary)},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    torch.load(file, weights_only=False)
    assert canary.exists()  # the pickle does harm if it is run
    canary.unlink()
    with pytest.raises(UnsafeCheckpointError):
        convert(source, tmp_path / "out", verifier)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
