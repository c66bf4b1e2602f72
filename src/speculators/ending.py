"""What every object says that a command prints with ``--json``."""

from pydantic import BaseModel, Field

__all__ = ["Ending"]


class Ending(BaseModel):
    """How a command ended: its exit status, and what its log says."""

    ok: bool = True
    """Whether the command did what it was asked for: its exit status is then 0."""
    error: str | None = None
    """The sentence that says what went wrong; ``null`` if ``ok``."""
    warnings: list[str] = Field(default_factory=list)
    """What the log warns of."""

    def fail(self, error: str) -> None:
        """Say what went wrong."""
        self.ok, self.error = False, error
