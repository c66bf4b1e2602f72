"""Whether the installation works: versions, namesakes, vLLM and its plugin, the Hub and its cache.

Nothing heavy is imported: what is installed is read from the packages' metadata.
"""

import os
import platform
import re
import shutil
from collections.abc import Collection, Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict

import speculators
from speculators import ANOTHERS, __version__
from speculators.ending import Ending
from speculators.integrations.vllm.releases import (
    INSTALL,
    TESTED_RELEASES,
    is_tested,
    missing_parts,
)

__all__ = ["Check", "Diagnosis", "diagnose"]

PLUGIN_GROUP = "vllm.general_plugins"

VLLM = re.compile(r"vllm(-cpu.*)?")
"""The names of packages that provide vLLM."""

CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+(?=@)")
"""The user name and password in a URL."""

MORE_ADVICE = {"torch": "; its build for CPUs is a tenth as large (docs/installation.md)"}
"""By package, what to know before it is installed."""

LITTLE_SPACE = 10 * 10**9
"""Bytes; a verifier of eight billion parameters takes 16 GB, its head alone 1 GB."""


class Check(BaseModel):
    """One thing that was checked."""

    model_config = ConfigDict(extra="forbid")

    name: str
    status: Literal["ok", "absent", "warning", "broken"]
    """absent: it is not there, but is optional. broken: something will not work."""
    found: str | None = None
    expected: str | None = None
    """The versions that speculators supports, if they are limited."""
    advice: str | None = None
    """What to do, if there is anything to do."""


class Diagnosis(Ending):
    """What ``speculators doctor --json`` prints; ``ok`` says whether nothing is broken."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    checks: list[Check]


def diagnose() -> Diagnosis:
    """Check everything that can be checked without importing torch or using the network."""
    checks = [check for look in (_python, _namesake, _packages, _vllm, _hub) for check in look()]
    diagnosis = Diagnosis(checks=checks)
    if broken := [check.name for check in checks if check.status == "broken"]:
        diagnosis.fail(f"Broken: {', '.join(broken)}.")
    return diagnosis


def _python() -> Iterator[Check]:
    yield Check(name="speculators", status="ok", found=__version__)
    expected = metadata.metadata("speculators")["Requires-Python"]
    yield _versioned("python", platform.python_version(), SpecifierSet(expected))


def _namesake() -> Iterator[Check]:
    """The project called speculators on PyPI, whose package has the same name as this one's."""
    others = [
        (distribution.version, Path(str(distribution.locate_file("speculators"))))
        for distribution in metadata.distributions(name="speculators")
        if f"speculators/{ANOTHERS}," in (distribution.read_text("RECORD") or "")
    ]
    here = Path(speculators.__file__).parent
    if not others and (here / ANOTHERS).exists():
        others.append(("some release", here))
    for version, folder in others:
        yield Check(
            name="another speculators",
            status="broken",
            found=f"{version} in {folder}",
            advice=f"pip uninstall speculators, until there is none left, then delete {folder} "
            "and install this project again",
        )


def _packages() -> Iterator[Check]:
    for line in metadata.requires("speculators") or ():
        required = Requirement(line)
        if required.marker is None or required.marker.evaluate({"extra": ""}):
            yield _versioned(required.name, _version(required.name), required.specifier)


def _versioned(name: str, found: str | None, expected: SpecifierSet) -> Check:
    fits = found is not None and expected.contains(found, prereleases=True)
    return Check(
        name=name,
        status="ok" if fits else "broken",
        found=found,
        expected=str(expected),
        advice=None if fits else f"install {name} {expected}{MORE_ADVICE.get(name, '')}",
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> Iterator[Check]:
    installed = {
        distribution.name: distribution.version
        for distribution in metadata.distributions()
        if VLLM.fullmatch(distribution.name or "")
    }
    plugins = [
        plugin
        for plugin in metadata.entry_points(group=PLUGIN_GROUP)
        if plugin.module.partition(".")[0] == "speculators"
    ]
    problem = _load_problem(plugins)
    if not installed:
        yield Check(
            name="vllm", status="absent", advice="to serve drafts, install vllm beside speculators"
        )
    for name, version in installed.items():
        advice = None if is_tested(version) else f"{_in_an_untested_vllm()}; {INSTALL}"
        yield Check(
            name=name,
            status="warning" if advice else "ok",
            found=version,
            expected=", ".join(f"=={release}" for release in TESTED_RELEASES),
            advice=advice,
        )
    if not plugins:
        problem = f"speculators has no entry point in {PLUGIN_GROUP}: install it again"
    yield Check(
        name="vllm plugin",
        status="ok" if not problem else "broken" if installed else "absent",
        found=", ".join(plugin.value for plugin in plugins) or None,
        advice=problem if installed else None,
    )


def _load_problem(plugins: Collection[metadata.EntryPoint]) -> str | None:
    """Why the plugin cannot be loaded."""
    for plugin in plugins:
        try:
            import_module(plugin.module)
        except ImportError as error:
            return f"it cannot be loaded ({error}): install speculators again"
    return None


def _in_an_untested_vllm() -> str:
    """What the plugin does in the installed vLLM, which is not a tested release."""
    spec = find_spec("vllm")
    missing = [
        problem
        for directory in (spec and spec.submodule_search_locations) or ()
        for problem in missing_parts(Path(directory))
    ]
    if missing:
        return f"the plugin does nothing in this vLLM ({'; '.join(missing)})"
    return "the plugin was not tested with this vLLM, but the parts of it that it uses look right"


def _hub() -> Iterator[Check]:
    if find_spec("huggingface_hub") is None:  # which is reported among the packages
        return
    from huggingface_hub import constants, get_token

    endpoint = CREDENTIALS.sub("***", constants.ENDPOINT)
    offline = " (not used, since HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    yield Check(name="hub endpoint", status="ok", found=endpoint + offline)
    token = get_token()
    yield Check(
        name="hub token",
        status="ok" if token else "absent",
        found=_token_source() if token else None,
        advice=None if token else "for private and gated repositories, set HF_TOKEN",
    )
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    yield Check(
        name="hub cache",
        status="ok" if writable else "broken",
        found=str(cache),
        advice=None if writable else "it cannot be written: choose another with HF_HOME",
    )
    free = shutil.disk_usage(existing).free
    yield Check(
        name="free space there",
        status="ok" if free >= LITTLE_SPACE else "warning",
        found=f"{free / 1e9:.1f} GB",
        advice=None if free >= LITTLE_SPACE else "a verifier may not fit",
    )


def _token_source() -> str:
    """Where the token comes from; never the token."""
    from huggingface_hub import constants

    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return f"set by {named[0]}" if named else f"in {constants.HF_TOKEN_PATH}"
