"""`python -m speculators` is `speculators`."""

from speculators.cli import main

if __name__ == "__main__":
    main()
