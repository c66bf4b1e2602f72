"""vLLM's plugin: `vllm serve` on a converted directory."""
