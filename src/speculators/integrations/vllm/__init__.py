"""The vLLM plugin, which lets `vllm serve` run a converted directory."""
