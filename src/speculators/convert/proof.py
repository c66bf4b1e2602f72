"""What the validation of a converted directory came to."""

from dataclasses import dataclass, field

__all__ = ["Proof"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proven of a converted directory, and what was not.

    Attributes:
        proven: clauses that follow the directory's name.
        left_open: sentences on what could not be checked, and why; each is in the log, too.

    """

    proven: list[str] = field(default_factory=list)
    left_open: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """What to say after the directory's name; nothing if nothing was left open."""
        if not self.left_open:
            return ""
        open_ = " ".join(f"{it.removesuffix('.')}." for it in self.left_open)
        return f". Proven: it {' and '.join(self.proven)}. Left open: {open_}"
