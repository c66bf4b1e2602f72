"""How a kind of checkpoint is recognised: by its tensors, with the config as a hint."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ENGINES", "Serving", "Signature"]

ENGINES = ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM")
"""Those that are spoken of: vLLM 0.33.0, SGLang 0.5.23, and the other two of November 2026."""

NEVER = r"(?!)"


@dataclass(frozen=True, slots=True)
class Serving:
    """How an engine serves drafts of a kind.

    Attributes:
        engine: one of ``ENGINES``.
        option: what to tell it: vLLM's method, SGLang's algorithm, and so on; empty if it does not
            serve them any more.
        until: the last release that serves them; empty if the current one does.
        note: what else to know, as a clause.

    """

    engine: str
    option: str
    until: str = ""
    note: str = ""

    def __str__(self) -> str:
        """The engine, and in parentheses how it is told."""
        last = f" up to {self.until}" if self.until else ""
        return f"{self.engine}{last} ({'; '.join(filter(None, (self.option, self.note)))})"


@dataclass(frozen=True, slots=True)
class Signature:
    """A kind of checkpoint, and how to recognise it.

    Attributes:
        kind: its name for programs.
        title: its name in messages, as it follows "holds".
        marks: a pattern of tensor names; one match is enough to show the kind.
        fc_inputs: the input width of ``fc``, in hidden sizes; this, too, is enough on its own.
        both: whether the marks and the width of ``fc`` show the kind only together.
        attention_inputs: the input width of the first layer's attention, in hidden sizes; enough on
            its own.
        needs: patterns of tensor names; without a match of each, the kind is not shown.
        never: a pattern of names that it never has.
        hinted: whether the marks show the kind only together with all of the hints.
        alone: whether a mark shows the kind only if it is all that is there.
        lacks: a tensor that it never has.
        hints: key of config.json → a pattern of its value. Hints that match are added to the
            evidence; without tensors to judge by, the kind is assumed if all of them match.
        decisive: whether the hints alone decide, whatever the tensors are.
        parts: tensors that every such checkpoint has; an unknown checkpoint is compared with them.
        advice: what to do instead of converting it; ``None`` for a kind that is converted.
        serving: which engines serve it, and how; ``None`` if it is no draft.

    """

    kind: str
    title: str
    marks: str = NEVER
    fc_inputs: int | None = None
    both: bool = False
    attention_inputs: int | None = None
    needs: tuple[str, ...] = ()
    never: str = NEVER
    hinted: bool = False
    alone: bool = False
    lacks: str | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    decisive: bool = False
    parts: tuple[str, ...] = ()
    advice: str | None = None
    serving: tuple[Serving, ...] | None = None

    @property
    def served(self) -> str | None:
        """A clause on which engines serve it; ``None`` if it is no draft."""
        if self.serving is None:
            return None
        if not self.serving:
            return "no engine serves it"
        return f"it is served by {', '.join(map(str, self.serving))}"
