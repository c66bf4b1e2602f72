"""What is wrong with data that breaks a schema, in words."""

from typing import NamedTuple

from pydantic import ValidationError

__all__ = ["Problem", "first_problem"]


class Problem(NamedTuple):
    """The first thing that is wrong.

    Attributes:
        key: the key, with dots between levels; empty if it is about the whole.
        message: a clause that says what is expected.
        type: pydantic's name for this type of problem, such as ``extra_forbidden``.

    """

    key: str
    message: str
    type: str

    def __str__(self) -> str:
        """As it follows the name of a file and a comma or colon."""
        return f"key {self.key}: {self.message}" if self.key else self.message


def first_problem(error: ValidationError) -> Problem:
    """The first of the problems that pydantic found."""
    first = error.errors()[0]
    # pydantic puts these words before the message of a validator of ours.
    message = first["msg"].removeprefix("Value error, ")
    return Problem(".".join(map(str, first["loc"])), message, first["type"])
