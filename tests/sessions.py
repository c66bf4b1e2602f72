"""Console sessions in the documentation, run again."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["check_sessions"]

VARYING = {
    r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d": "TIME",
    r"\b[0-9a-f]{40}\b": "COMMIT",
    r"127\.0\.0\.1:\d+": "HOST",
    r"(?<=  )\d+\.\d\b": "SECONDS",
}


def check_sessions(page: Path, directory: Path, environment: Mapping[str, str]) -> int:
    """Run what a page shows in blocks that say ``console``, one after the other.

    A file that the page shows by ``cat``, and that is not there, is made first.

    Args:
        page: the page, in Markdown.
        directory: where the commands are run.
        environment: variables to set.

    Returns:
        How many commands there were.

    """
    program = directory / "bin" / "speculators"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m speculators "$@"\n')
    program.chmod(0o755)
    variables = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "COLUMNS": "80",
    }
    sessions = [
        session
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
        for session in re.findall(r"\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block)
    ]
    for command, shown in sessions:
        file = directory / command.removeprefix("cat ")
        if command.startswith("cat ") and not file.exists():
            file.write_text(shown)
        done = subprocess.run(
            command,
            shell=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=variables | dict(environment),
        )
        assert _masked(done.stdout) == _masked(shown), command
    return len(sessions)


def _masked(text: str) -> str:
    for pattern, mask in VARYING.items():
        text = re.sub(pattern, mask, text, flags=re.MULTILINE)
    return text
