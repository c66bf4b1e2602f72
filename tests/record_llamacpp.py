"""Record what llama.cpp's converter reads of exports of golden drafts, and what it writes.

``python tests/record_llamacpp.py export EXPORTS`` writes the exports. ``python
tests/record_llamacpp.py convert EXPORTS LLAMA_CPP`` converts them with the sources of llama.cpp, in
an environment that has what convert_hf_to_gguf.py needs, and writes ``recorded/llamacpp.json``; the
variable LLAMA_CPP says which release of llama.cpp it is.
"""

import json
import os
import shutil
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

from llamacpp_reads import RECORD, flat_config

__all__: list[str] = []

TESTS = Path(__file__).parent
BOOKKEEPING = ("GGUF.", "general.", "tokenizer.ggml.model", "tokenizer.ggml.pre")
LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")


def write_exports(root: Path) -> None:
    """Export the golden EAGLE-3 drafts and those of ``test_dflash`` that are recorded."""
    from dflash import PLAIN, SELECTING, TARGET, converted, write_draft
    from eagle3 import TARGET as TARGET3
    from eagle3 import convert_golden3
    from speculators.convert.export import export

    sys.path.insert(0, str(TESTS / "convert"))
    for name in import_module("test_eagle3_export").FOR_LLAMACPP:
        draft = convert_golden3(name, root / "_eagle3" / name, validate=False)
        export(draft, root / name, "llamacpp")
        own = root / "_eagle3" / name / "verifier"
        shutil.copytree(own if own.exists() else TARGET3, root / name / "_verifier")
    blocks = import_module("test_dflash")
    for name in blocks.FOR_LLAMACPP:
        config, edit = blocks.DRAFTS[name]
        golden = SELECTING if "DFlash 2" in name else PLAIN
        source = write_draft(root / "_dflash" / name, config, edit, golden)
        export(converted(source, root / "_dflash" / f"{name}, ours"), root / name, "llamacpp")
        shutil.copytree(TARGET, root / name / "_verifier")


class Watched(dict[str, Any]):
    """A config that notes which of its keys are looked at."""

    def __init__(self, config: dict[str, Any], seen: set[str], path: str = "") -> None:
        super().__init__(
            {
                key: Watched(value, seen, f"{key}.") if key == "dflash_config" else value
                for key, value in config.items()
            }
        )
        self.seen, self.path = seen, path

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.path + key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(self.path + key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.path}{key}")
        return super().__contains__(key)


def record(root: Path, sources: Path) -> None:
    """Convert every export, and write what was read and what became of it."""
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    converter, transformers = import_module("convert_hf_to_gguf"), import_module("transformers")
    base: Any = import_module("conversion.base")
    llama: Any = import_module("conversion.llama")
    gguf = import_module("gguf")
    seen: set[str] = set()

    def watched(config: dict[str, Any], directory: Path) -> dict[str, Any]:
        return Watched(config, seen) if directory.name != "_verifier" else config

    load_hparams = base.ModelBase.load_hparams
    base.ModelBase.load_hparams = staticmethod(
        lambda directory, is_mistral_format=False: watched(
            load_hparams(directory, is_mistral_format), directory
        )
    )
    loader = types.SimpleNamespace(
        load=lambda file: watched(json.load(file), Path(file.name).parent), loads=json.loads
    )
    llama.json = loader
    # The golden verifiers have no tokenizer, and no prompt is tokenized.
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    exports = {}
    for export in sorted(it for it in root.iterdir() if not it.name.startswith("_")):
        seen.clear()
        _write_tokenizer(export / "_verifier")
        file = root / f"_{export.name}.gguf"
        options = ["--outtype", "f32", "--target-model-dir", str(export / "_verifier")]
        sys.argv = ["convert_hf_to_gguf.py", str(export), *options, "--outfile", str(file)]
        converter.main()
        reader = gguf.GGUFReader(file)
        exports[export.name] = {
            "read": {key: it for key, it in sorted(flat_config(export).items()) if key in seen},
            "wrote": {
                name: field.contents()
                for name, field in reader.fields.items()
                if name not in LISTS and not name.startswith(BOOKKEEPING)
            },
            "tensors": {it.name: [int(size) for size in it.shape[::-1]] for it in reader.tensors},
        }
    by = f"{os.environ['LLAMA_CPP']}, transformers {transformers.__version__}"
    rows = [f'"by": {json.dumps(by)}']
    for name, found in exports.items():
        parts = ",\n".join(f'  "{part}": {json.dumps(it)}' for part, it in found.items())
        rows.append(f'"{name}": {{\n{parts}}}')
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def _write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes, which any vocabulary of more than 256 tokens has room for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {it: number for number, it in enumerate([*alphabet, "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    command, exports, *rest = sys.argv[1:]
    if command == "export":
        write_exports(Path(exports))
    else:
        record(Path(exports), Path(*rest))
