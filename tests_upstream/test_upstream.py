"""What is converted here, loaded and computed by the PyPI project speculators, whose format it is.

Both packages have the same name, so that one has an environment of its own: `make test-upstream`.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors import safe_open

from eagle3 import GOLDEN3, NAMES, convert_golden3, golden3
from helpers import TOLERANCE, Tensors, largest_difference

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-upstream" / "bin" / "python"

OTHERWISE = ("fc_bias", "target_hidden_48")
"""Golden drafts that it cannot compute: its ``fc`` has no bias and reads states of one width."""

Results = tuple[Tensors, Mapping[str, str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The logits of each converted golden draft, and why others were not loaded."""
    root = tmp_path_factory.mktemp("upstream")
    job = {
        name: (
            str(convert_golden3(name, root / name, validate=False)),
            str(GOLDEN3 / name / "golden.safetensors"),
        )
        for name in NAMES
    }
    result = root / "result.safetensors"
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("compute.py"), result],
        check=False,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stdout
    with safe_open(result, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERWISE])
def test_upstream_computes_the_golden_logits(results: Results, name: str) -> None:
    found, errors = results
    assert name not in errors
    golden = golden3(name)
    expected = golden.get("parallel_logits", golden.get("chain_logits"))
    assert expected is not None
    assert largest_difference(found[name], expected) < TOLERANCE


def test_upstream_cannot_compute_the_others(results: Results) -> None:
    """If it can one day, they belong above, and `inspect` need not warn."""
    found, errors = results
    assert "mismatch" in errors["target_hidden_48"]
    assert largest_difference(found["fc_bias"], golden3("fc_bias")["chain_logits"]) > 0.1
