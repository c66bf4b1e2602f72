"""Who reads what is exported; light, since the command line lists them in its help."""

__all__ = ["READERS"]

READERS = {
    "eagle": "the research code",
    "dflash": "z-lab's dflash",
    "vllm": "vLLM without the plugin",
    "sglang": "SGLang",
    "specforge": "SpecForge",
    "modelopt": "ModelOpt",
    "llamacpp": "llama.cpp's converter",
    "trtllm": "TensorRT-LLM",
}
"""Name of a target on the command line → who reads it. A family can be exported to some of them."""
