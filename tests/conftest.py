"""What pytest reads first, without torch: the process that starts the others does not need it."""

import gc

import pytest

gc.disable()  # until all is imported


def pytest_configure(config: pytest.Config) -> None:
    starts_others = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not starts_others:
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all that was imported, again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # tests make much that is soon garbage
    gc.enable()
