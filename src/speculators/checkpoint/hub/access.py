"""How the Hub is reached, by everything that one command or call opens."""

import os
from dataclasses import dataclass, field

__all__ = ["DEFAULT_ACCESS", "HubAccess"]


@dataclass(frozen=True, slots=True)
class HubAccess:
    """A cache and a token; whatever is opened keeps them, for what it names in turn.

    Attributes:
        cache_dir: where downloads are kept; the Hub client's default cache if ``None``.
        token: an access token; the one that the client finds if ``None``. No message has it.

    """

    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = field(default=None, repr=False)


DEFAULT_ACCESS = HubAccess()
