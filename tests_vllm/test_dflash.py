"""A trained DFlash draft, converted, and served by vLLM as it is, without the plugin.

On a CPU, vLLM norms the context keys of all layers with the first layer's ``k_norm``
(findings/vllm-0.32-norms-dflash-context-by-the-first-layer.sh). So the draft is served twice: as it
is, and with that norm in all layers, where nothing is wrong.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from drafts import EXAMPLES, VERIFIER
from processes import ENGINE, WITHOUT_PLUGINS, Outcomes, run
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
    "as trained": ReferenceOnCpus,
    "with one k_norm": DFlashReference,
}
"""What vLLM computes of each draft."""


def with_one_k_norm(directory: Path) -> Path:
    """The trained draft, with the first layer's ``k_norm`` in all layers."""
    shutil.copytree(TRAINED, directory)
    tensors = load_file(TRAINED / "model.safetensors")
    name = "layers.{}.self_attn.k_norm.weight"
    for layer in range(json.loads((TRAINED / "config.json").read_text())["num_hidden_layers"]):
        tensors[name.format(layer)] = tensors[name.format(0)].clone()
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    sources = dict(zip(REFERENCES, (TRAINED, with_one_k_norm(root / "source")), strict=True))
    return {
        name: convert(None, it, root / name, VERIFIER, validate=False)
        for name, it in sources.items()
    }


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
    tmp_path_factory: pytest.TempPathFactory,
    converted: dict[str, Path],
    prompts: list[list[int]],
) -> Outcomes:
    """What vLLM answers when it is given a converted directory, which says all the rest."""
    whole = {"max_num_batched_tokens": 1024}  # proposals begin after the prompt
    engines = {name: ENGINE | whole | {"model": str(it)} for name, it in converted.items()}
    outcomes = run(tmp_path_factory.mktemp("served") / "result", prompts, engines, WITHOUT_PLUGINS)
    assert not outcomes.refused
    return outcomes


@pytest.fixture(scope="module")
def verifier() -> Any:
    return LlamaForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(verifier: Any, prompts: list[list[int]], served: Outcomes) -> list[Known]:
    """The prompts and the answers, a block longer: vLLM also accepts beyond an answer's end."""
    return known(verifier, prompts, served.answers["as trained"].tokens, LENGTH)


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_proposals_and_acceptance_are_those_of_the_reference(
    converted: dict[str, Path],
    served: Outcomes,
    verifier: Any,
    conversations: list[Known],
    name: str,
) -> None:
    answers = served.answers[name]
    config: Any = open_converted(converted[name]).config
    tensors = load_file(converted[name] / "model.safetensors")
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
