"""The command line: one module per command, which only parses and prints."""

import sys

from speculators.cli.signals import StoppedError
from speculators.cli.streams import open_missing_streams

__all__ = ["main"]


def main() -> None:
    """Run the command line, and exit with one of the statuses that ``shared`` lists."""
    open_missing_streams()
    try:
        # Imported here, so that Ctrl-C during the imports is reported like any other.
        from speculators.cli.app import run

        run()
    except StoppedError as stopped:  # before there is a log
        print(stopped.message, file=sys.stderr)
        raise SystemExit(stopped.code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except OSError as error:  # commands report their own: this one is about what is printed
        print(f"The output cannot be printed: {error.strerror}.", file=sys.stderr)
        raise SystemExit(1) from None
