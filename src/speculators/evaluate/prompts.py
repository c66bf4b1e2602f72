"""Prompts from jsonl files, one prompt per line; without torch.

A line has one of three keys: ``turns``, a list of a user's messages, of which the first is used
(MT-bench's ``question.jsonl``); ``prompt``, one message; or ``messages``, a conversation that ends
with a user's message. ``question_id`` and ``category`` are optional, other keys are ignored.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic import ValidationError as PydanticValidationError

from speculators.errors import PromptsError
from speculators.format.problems import first_problem

__all__ = ["OWN_PROMPTS", "Message", "Prompt", "read_prompts"]

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""80 prompts that come with speculators: MT-bench's eight categories in rotation, ten of each."""

NO_CATEGORY = "uncategorized"

Text = Annotated[str, StringConstraints(min_length=1, strict=True)]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation for a model to continue.

    Attributes:
        id: ``question_id``, or the number of the line.
        category: ``uncategorized`` if the line has none.
        messages: the conversation, ending with a user's message.

    """

    id: str
    category: str
    messages: tuple[Message, ...]


class Line(BaseModel):
    """One line of a file of prompts."""

    question_id: int | str | None = None
    category: Text = NO_CATEGORY
    turns: list[Text] | None = Field(default=None, min_length=1)
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Line":
        given = [key for key in ("turns", "prompt", "messages") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of turns, prompt and messages is expected, found {' and '.join(given)}"
                if given
                else "one of turns, prompt and messages is expected"
            )
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("the last of messages must have the role user")
        return self

    def conversation(self) -> tuple[Message, ...]:
        if self.messages is not None:
            return tuple(self.messages)
        first = self.prompt if self.turns is None else self.turns[0]
        return (Message(role="user", content=first or ""),)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts; empty lines are skipped.

    Raises:
        PromptsError: if the file cannot be read, a line is not a prompt (the message names the
            line), or there are no prompts.

    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path} is not text in UTF-8: {error.reason}.") from error
    except OSError as error:
        raise PromptsError(
            f"The prompts in {path} cannot be read: {error.strerror or error}."
        ) from error
    prompts = [
        _parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not prompts:
        raise PromptsError(
            f'{path} has no prompts; give one a line, as {{"prompt": ...}} or in MT-bench\'s style.'
        )
    return prompts


def _parse(text: str, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        raise PromptsError(f"{where} is not valid JSON: {detail}.") from error
    if not isinstance(value, dict):
        raise PromptsError(f"{where} is not a JSON object; give one prompt per line.")
    try:
        line = Line.model_validate(value)
    except PydanticValidationError as error:
        raise PromptsError(f"{where}: {first_problem(error)}.") from error
    return Prompt(
        id=str(number if line.question_id is None else line.question_id),
        category=line.category,
        messages=line.conversation(),
    )
