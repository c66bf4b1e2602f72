"""A trained DFlash draft, converted, and served by vLLM, with the plugin and without.

On a CPU, vLLM norms the context keys of all layers with the first layer's ``k_norm``
(findings/vllm-0.32-norms-dflash-context-by-the-first-layer.sh). The plugin mends that.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from drafts import EXAMPLES, VERIFIER
from processes import ENGINE, WITHOUT_PLUGINS, Answers, run
from simulation import Known, known
from speculators.convert.conversion import convert
from speculators.convert.references.dflash import DFlashReference
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.families.converted import open_converted

TRAINED = EXAMPLES / "smollm2-135m-dflash"
LENGTH = 7
"""The tokens of a block, which is what the config says to draft."""

torch.set_num_threads(1)


class ReferenceOnCpus(DFlashReference):
    """The reference, but with the first layer's ``k_norm`` for the context of all layers."""

    def _norm(self, name: str, x: Tensor) -> Tensor:
        normed = super()._norm(name, x)
        if not name.endswith("k_norm"):
            return normed
        context = len(x) - self.config.block_size
        first = super()._norm("layers.0.self_attn.k_norm", x[:context])
        return torch.cat((first, normed[context:]))


REFERENCES: dict[str, type[DFlashReference]] = {
    "with the plugin": DFlashReference,
    "without plugins": ReferenceOnCpus,
}
"""What vLLM computes of the draft."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "draft"
    return convert(TRAINED, out, VERIFIER, validate=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    chats = [
        [message.model_dump() for message in prompt.messages]
        for prompt in read_prompts(OWN_PROMPTS)[:3]
    ]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True)
    tokens: list[list[int]] = encoded["input_ids"]
    return tokens


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, converted: Path, prompts: list[list[int]]
) -> dict[str, Answers]:
    """What vLLM answers when it is given the converted directory, which says all the rest."""
    root = tmp_path_factory.mktemp("served")
    whole = {"max_num_batched_tokens": 1024}  # proposals begin after the prompt
    engines = {"dflash": ENGINE | whole | {"model": str(converted)}}
    outcomes = {
        "with the plugin": run(root / "with", prompts, engines),
        "without plugins": run(root / "without", prompts, engines, WITHOUT_PLUGINS),
    }
    assert not any(it.refused for it in outcomes.values())
    return {name: it.answers["dflash"] for name, it in outcomes.items()}


@pytest.fixture(scope="module")
def verifier() -> Any:
    return LlamaForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(
    verifier: Any, prompts: list[list[int]], served: dict[str, Answers]
) -> list[Known]:
    """The prompts and the answers, a block longer: vLLM also accepts beyond an answer's end."""
    return known(verifier, prompts, served["without plugins"].tokens, LENGTH)


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_proposals_and_acceptance_are_those_of_the_reference(
    converted: Path,
    served: dict[str, Answers],
    verifier: Any,
    conversations: list[Known],
    name: str,
) -> None:
    answers = served[name]
    config: Any = open_converted(converted).config
    tensors = load_file(converted / "model.safetensors")
    draft = REFERENCES[name]({key: it.float() for key, it in tensors.items()}, config)
    embeddings = verifier.get_input_embeddings().weight
    accepted = [0] * LENGTH
    for row, conversation in enumerate(conversations):
        tokens, anchor = conversation.tokens, conversation.prompt_tokens
        assert answers.tokens[row] == tokens[0, anchor : conversation.end].tolist()
        seen = verifier(tokens, output_hidden_states=True)
        best = seen.logits[0].argmax(-1).tolist()
        assert answers.tokens[row] == best[anchor - 1 : conversation.end - 1]
        layers = config.aux_hidden_state_layer_ids
        states = torch.cat([seen.hidden_states[layer][0] for layer in layers], -1)
        steps = iter(answers.proposals[row])
        while anchor + 1 < conversation.end:
            block = torch.full((config.block_size,), config.mask_token_id)
            block[0] = tokens[0, anchor]
            outputs = draft(embeddings[block], states[:anchor])
            expected = draft.logits(outputs, embeddings).argmax(-1)[1:].tolist()
            assert next(steps) == expected
            follows = best[anchor : anchor + LENGTH]
            right = next((n for n in range(LENGTH) if expected[n] != follows[n]), LENGTH)
            accepted[:right] = [count + 1 for count in accepted[:right]]
            anchor += right + 1
    assert answers.accepted == accepted
    assert answers.acceptance_length > 1.5
