"""Dependencies point one way, between packages and between modules."""

import ast
from functools import cache
from pathlib import Path

import pytest

import speculators

ROOT = Path(speculators.__file__).parent

MAY_IMPORT = {
    "errors": set[str](),
    "ending": set[str](),
    "checkpoint": {"errors"},
    "format": {"checkpoint", "errors"},
    "families": {"format", "checkpoint", "errors"},
    "decode": {"format", "errors"},
    "models": {"mtp", "decode", "families", "format", "checkpoint", "errors"},
    "convert": {"models", "families", "format", "checkpoint", "errors"},
    "chat": {"evaluate", "decode", "format"},
    "evaluate": {
        "mtp",
        "decode",
        "models",
        "families",
        "format",
        "checkpoint",
        "ending",
        "errors",
    },
    "integrations": {"families", "format", "checkpoint", "errors"},
    "mtp": {"families", "checkpoint", "errors"},
    "inspection": {
        "mtp",
        "convert",
        "integrations",
        "families",
        "format",
        "checkpoint",
        "ending",
        "errors",
    },
    "publish": {"convert", "evaluate", "families", "format", "checkpoint", "errors"},
    "comparison": {"convert", "models", "families", "format", "checkpoint", "errors"},
    "batch": {"publish", "convert", "families", "format", "checkpoint", "errors"},
    "cli": {
        "batch",
        "chat",
        "comparison",
        "mtp",
        "publish",
        "evaluate",
        "inspection",
        "convert",
        "families",
        "format",
        "checkpoint",
        "ending",
        "errors",
    },
}
"""Package → the others that it may import. All may import the version from ``speculators``."""

OF_FAMILIES = (
    "speculators.families.dflash",
    "speculators.convert.references.dflash",
    "speculators.models.dflash",
    "speculators.families.eagle",
    "speculators.convert.eagle",
    "speculators.convert.references.eagle",
    "speculators.models.eagle",
)
"""What the names of modules of a family begin with."""


def module_name(file: Path) -> str:
    parts = [ROOT.name, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


@cache
def imports(module: str, *, top_level: bool = False) -> set[str]:
    """The modules of speculators that a module imports, also in functions unless ``top_level``."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    nodes = list(tree.body) if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else str(node.module))
    return {name for name in found if name.split(".")[0] == ROOT.name}


def package(module: str) -> str:
    """``convert`` for ``speculators.convert.plan``; empty for ``speculators``."""
    return module.partition(".")[2].partition(".")[0]


def test_the_imports_are_found() -> None:
    assert "speculators.errors" in imports("speculators.format.conversion")
    assert "speculators.cli.plan_view" in imports("speculators.cli.convert")
    assert "speculators.cli.plan_view" not in imports("speculators.cli.convert", top_level=True)


@pytest.mark.parametrize("module", [module for module in FILES if package(module) in MAY_IMPORT])
def test_dependencies_point_one_way(module: str) -> None:
    of = package(module)
    imported = {package(name) for name in imports(module)} - {"", of}
    assert imported <= MAY_IMPORT[of]


def test_the_package_itself_imports_nothing() -> None:
    assert imports("speculators") == set()


def check_no_cycle(needs: dict[str, set[str]]) -> None:
    """Check that the graph, of each module or folder with those that it imports, has no cycle."""
    while needs:
        free = {it for it in needs if not needs[it] & needs.keys() - {it}}
        assert free, f"a cycle among {sorted(needs)}"
        needs = {it: needs[it] for it in needs.keys() - free}


def test_there_are_no_cycles() -> None:
    """There are no cycles between modules either, imports within functions included."""
    check_no_cycle({module: imports(module) for module in FILES})


FOLDERS = [module for module, file in FILES.items() if file.name == "__init__.py"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_are_no_cycles_between_the_parts_of_a_package(folder: str) -> None:
    """The folders and single modules of a package import each other one way, too."""

    def part(module: str) -> str:
        """``report`` for ``speculators.evaluate.report`` in ``speculators.evaluate``."""
        inside, _, rest = module.partition(f"{folder}.")
        return "" if inside else rest.partition(".")[0]

    needs: dict[str, set[str]] = {}
    for module in FILES:
        needs.setdefault(part(module), set()).update(map(part, imports(module)))
    needs.pop("")  # what is elsewhere, and the package itself
    check_no_cycle(needs)


@pytest.mark.parametrize(
    "module",
    [
        it
        for it in FILES
        if not it.startswith(OF_FAMILIES)
        and it != "speculators.families.registry"
        and package(it) != "integrations"
    ],
)
def test_general_code_imports_no_family(module: str) -> None:
    """The registry and the vLLM part may name families, and families themselves may."""
    assert not [it for it in imports(module) if it.startswith(OF_FAMILIES)]


@pytest.mark.parametrize("module", FILES)
def test_torch_is_imported_at_the_top_only_where_models_are(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    heavy = {
        name.split(".")[0]
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    } & {"torch", "transformers"}
    proof = {
        module
        for module in FILES
        if module.startswith(
            (
                "speculators.comparison.computation",
                "speculators.convert.references.",
                "speculators.convert.checks.",
            )
        )
    }
    light = MAY_IMPORT.keys() - {"decode", "models", "evaluate", "chat", "integrations"}
    if package(module) in light:
        assert not heavy or module in proof
