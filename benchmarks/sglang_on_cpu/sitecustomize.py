"""Let SGLang's CPU engine draft without Intel's AMX; every process that has this folder imports it.

The kernels are in ``sgl_kernel.py``. What else stands in the way is edited as it is imported: the
engine's checks for AMX and for DFlash on a CPU, where its attention on CPUs takes the lengths of
the batch for those that it has worked out with the drafted tokens, and where a DFlash draft's
embeddings become bfloat16 whatever its dtype is.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import sgl_kernel
import torch

LENGTHS = "        seq_lens = forward_batch.seq_lens\n        if seq_lens.dtype"
NEW = "        _, max_extend_len = self.forward_metadata\n"
BLOCKS = """\
        if layer.attn_type.value == "encoder_only":
            tree_mask = torch.ones(int((extend_seq_lens**2).sum()), dtype=torch.bool)
"""
EDITS: dict[str, dict[str, str]] = {
    "sglang.srt.arg_groups.overrides": {"not cpu_has_amx_support()": "False"},
    "sglang.srt.arg_groups.speculative_hook": {
        'server_args.device == "npu"': 'server_args.device == "cpu"',
        '        "ascend",\n    )': '        "intel_amx",\n    )',
    },
    "sglang.srt.speculative.draft_worker_common": {'    "ascend",\n': '    "intel_amx",\n'},
    "sglang.srt.model_executor.model_runner": {".input_embeds.bfloat16()": ".input_embeds"},
    "sglang.srt.layers.attention.intel_amx_backend": {
        LENGTHS: "        if seq_lens.dtype",
        NEW: NEW + BLOCKS,
        "spec_info.tree_topk != 1": 'getattr(spec_info, "tree_topk", 1) != 1',
    },
}
"""The module → what is replaced in it, and by what."""


class Edits(MetaPathFinder):
    """Finds modules whose source is edited."""

    def __init__(self) -> None:
        self.finding = False

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Find one of them, and let its edited source be run."""
        if self.finding or name not in EDITS:
            return None
        self.finding = True
        try:
            spec = find_spec(name)
        finally:
            self.finding = False
        assert spec is not None
        loader: Any = spec.loader
        source = loader.get_source(name)
        for old, new in EDITS[name].items():
            assert old in source, f"{name} of this release has no {old!r}"
            source = source.replace(old, new)

        def run(module: ModuleType) -> None:
            exec(compile(source, spec.origin or name, "exec"), module.__dict__)

        loader.exec_module = run
        return spec


sys.meta_path.insert(0, Edits())
kernels = vars(torch.ops.sgl_kernel)
kernels["decode_attention_cpu"] = sgl_kernel.decode_attention
kernels["extend_attention_cpu"] = sgl_kernel.extend_attention
setattr(torch.Tensor, "record_stream", lambda *_: None)  # noqa: B010 - there are no streams
