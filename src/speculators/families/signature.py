"""How a kind of checkpoint is recognised: by its tensors, with the config as a hint."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators.checkpoint.tensor import TensorInfo

__all__ = ["ENGINES", "Serving", "Signature", "vllm"]

ENGINES = ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM")
"""Those that are covered: vLLM 0.33.0, SGLang 0.5.23, and the other two of November 2026."""

NEVER = r"(?!)"


@dataclass(frozen=True, slots=True)
class Serving:
    """How an engine serves drafts of a kind.

    Attributes:
        engine: one of ``ENGINES``.
        option: what to tell it: vLLM's method, SGLang's algorithm, and so on.
        until: the last release that serves them; empty if the current one does.
        note: what else to know, as a clause.
        lacks: pattern of tensor names → what they show a draft to have that the engine does not
            compute, as it follows "it".
        settings: what vLLM's ``--speculative-config`` has to say, beside the draft and the number
            of tokens.
        refuses: why else the engine does not serve a checkpoint with this config.json and tensors
            of these names, as a clause that follows "it"; ``None`` if it does.

    """

    engine: str
    option: str
    until: str = ""
    note: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    refuses: Callable[[Mapping[str, Any], Collection[str]], str | None] = (
        lambda config, names: None  # noqa: ARG005
    )

    def obstacle(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """Why the engine does not serve a draft of this kind, as a clause that follows "it".

        Args:
            config: its config.json.
            names: of its tensors.

        Returns:
            the clause; ``None`` if the engine serves it.

        """
        for pattern, what in self.lacks.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return f"has {what}"
        return self.refuses(config, names)

    def __str__(self) -> str:
        """The engine, and in parentheses what option it takes."""
        last = f" up to {self.until}" if self.until else ""
        return f"{self.engine}{last} ({'; '.join(filter(None, (self.option, self.note)))})"


def vllm(
    method: str,
    note: str = "",
    *,
    until: str = "",
    lacks: Mapping[str, str] | None = None,
    **settings: Any,
) -> Serving:
    """How vLLM serves drafts with a method, and with other settings of ``--speculative-config``."""
    said = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in settings.items())
    return Serving(
        "vLLM",
        f'method "{method}"',
        until,
        note or (f"with {said}" if said else ""),
        lacks or {},
        {"method": method, **settings},
    )


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
        serving: which engines serve it, and how; ``None`` if it is no draft. Of a family, a single
            draft may not be served by all of them; see ``serving.judge``.
        remark: a sentence on what else to know, by its tensors and their stored names.

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
    remark: Callable[[Mapping[str, TensorInfo]], str | None] = lambda tensors: None  # noqa: ARG005

    def served(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """A clause on which engines serve a draft of this kind; ``None`` if it is not a draft.

        Args:
            config: its config.json.
            names: of its tensors.

        """
        if self.serving is None:
            return None
        engines = ", ".join(str(it) for it in self.serving if not it.obstacle(config, names))
        if not engines:
            obstacles = {it.engine: it.obstacle(config, names) for it in self.serving}
            why = "; ".join(f"{engine} does not: it {what}" for engine, what in obstacles.items())
            return f"no engine serves it{f' ({why})' if why else ''}"
        # Of a family, it depends on the draft: see ``serving.judge``.
        return f"{'it is' if self.advice else 'such drafts are'} served by {engines}"
