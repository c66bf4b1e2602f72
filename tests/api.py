"""The signatures in docs/api.md, made from the code: ``python tests/api.py`` writes them.

The page's directives are for the site, which shows signatures and docstrings in their place, and
leaves out what is written here; the signatures are for whoever reads the page in the repository.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"

DIRECTIVE = re.compile(r"^::: (?P<name>[\w.]+)\n(?P<options>(?: +.*\n)*)", re.MULTILINE)
WRITTEN = re.compile(r"\n<!-- not run: signatures[^>]*-->\n```python\n.*?```\n", re.DOTALL)
HEAD = "\n<!-- not run: signatures, written by tests/api.py -->\n```python\n{}\n```\n"


def page(text: str) -> str:
    """The text of the page with its signatures as they are in the code."""
    return DIRECTIVE.sub(
        lambda match: match[0] + HEAD.format(signatures(match["name"], members(match["options"]))),
        WRITTEN.sub("", text),
    )


def members(options: str) -> list[str]:
    """The names that a directive lists."""
    _, _, listed = options.partition("members:")
    return re.findall(r"\b\w+\b", listed)


def signatures(name: str, members: list[str]) -> str:
    """What ``name`` is called with, or consists of, as its source says it."""
    found = resolved(name)
    if inspect.ismodule(found):
        classes = [it for it in vars(found).values() if inspect.isclass(it)]
        return "\n".join(class_line(it) for it in classes if it.__name__ in found.__all__)
    if not inspect.isclass(found):
        return header(found)
    parts = [*fields(found), *(header(member(found, it)) for it in listed(found, members))]
    body = "\n\n".join(parts) or "..."
    return f"{class_line(found)}\n{textwrap.indent(body, '    ')}"


def resolved(name: str) -> Any:
    """The module, class or function of this name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        return import_module(name)


def listed(of: type, members: list[str]) -> list[str]:
    """The members to show: those that are asked for, or all public functions of the class."""
    shown = (staticmethod, classmethod, property, FunctionType)
    own = [it for it, value in vars(of).items() if isinstance(value, shown) and it[0] != "_"]
    return members or [it for it in own if header(member(of, it))]


def member(of: type, name: str) -> Any:
    """A member as it is defined, in whichever base that is."""
    return inspect.getattr_static(of, name)


def class_line(of: type) -> str:
    """``class Name(Base):``."""
    bases = [it.__name__ for it in of.__bases__ if it not in {object} and it.__name__ != "ABC"]
    return f"class {of.__name__}{'(' + ', '.join(bases) + ')' if bases else ''}:"


def header(of: Any) -> str:
    """The lines of a function up to its docstring, with its decorators and ``...`` for a body."""
    function: Any = of.fget if isinstance(of, property) else getattr(of, "__func__", of)
    mark = "@staticmethod\n" if isinstance(of, staticmethod) else ""
    if function.__code__.co_filename.startswith("<"):
        return ""  # made by a decorator
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    text = "\n".join(source.splitlines()[: node.body[0].lineno - 1])
    return mark + re.sub(r"  # (?:type|noqa).*$", "", text, flags=re.MULTILINE) + " ..."


def fields(of: type) -> Iterator[str]:
    """The annotated attributes of a class, as one block."""
    source = textwrap.dedent(inspect.getsource(of))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    told = [
        str(ast.get_source_segment(source, it))
        for it in node.body
        if isinstance(it, ast.AnnAssign) and not ast.unparse(it.target).startswith("_")
    ]
    shown = [it for it in told if "ClassVar" not in it]
    if shown:
        yield "\n".join(shown)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
