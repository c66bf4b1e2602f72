"""Speculation with verifiers that have linear attention: exactly what they generate alone.

On a machine with a GPU all of it runs there.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_next import Qwen3NextConfig

from speculators.decode.cache import BlockCache
from speculators.decode.linear import linear_layers
from speculators.decode.loop import Generation
from speculators.decode.verification import VerifierPass
from speculators.errors import GenerationError
from tiny_models import SIZES, knowing_draft, random_draft
from tiny_models import prompt as prompt_on_cpu

NEW_TOKENS = 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "qwen3_next": (Qwen3NextConfig, EXPERTS),
    "qwen3_5_text": (Qwen3_5TextConfig, {}),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, EXPERTS),
}


def prompt(length: int, rows: int = 1) -> Tensor:
    return prompt_on_cpu(length, rows=rows).to(DEVICE)


def knowing(verifier: PreTrainedModel) -> Any:
    """A draft that is often right, beside its verifier."""
    return knowing_draft(verifier).to(verifier.device, verifier.dtype)  # type: ignore[arg-type]


def guessing(verifier: PreTrainedModel) -> Any:
    """A draft that is hardly ever right."""
    return random_draft(verifier).to(verifier.device, verifier.dtype)  # type: ignore[arg-type]


def verifier_of(kind: str, context: float = 0.3) -> PreTrainedModel:
    """A tiny verifier of three layers of linear attention and one of full attention.

    Its layers add enough to what it is given for its state to matter.
    """
    config_class, more = CONFIGS[kind]
    torch.manual_seed(1)
    config = config_class(
        **SIZES,
        **more,
        num_hidden_layers=4,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        initializer_range=0.5,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                parameter.mul_(context)
            if name.endswith("experts.down_proj"):
                parameter.mul_(context)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def verifier(request: pytest.FixtureRequest) -> PreTrainedModel:
    return verifier_of(request.param)


def generated(verifier: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    found: Tensor = verifier.generate(  # type: ignore[operator]
        ids, max_new_tokens=NEW_TOKENS, **{"do_sample": False, **settings}
    )
    return found


def speculated(draft: Any, ids: Tensor, **settings: Any) -> Generation:
    found = draft.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        **{"do_sample": False, **settings},
    )
    assert isinstance(found, Generation)
    return found


@pytest.mark.parametrize("length", [1, 2, 9])
def test_greedy_output_is_the_verifiers(verifier: PreTrainedModel, length: int) -> None:
    """Drafts of every quality: blocks are accepted whole, in part, and not at all."""
    ids = prompt(length)
    expected = generated(verifier, ids)
    seen = set[int]()
    for draft in (knowing(verifier), guessing(verifier)):
        found = speculated(draft, ids, num_draft_tokens=3)
        assert torch.equal(found.sequences, expected)
        seen |= set(found.accepted[0])
    assert 0 in seen
    assert len(seen) > 1


def test_prompts_of_different_lengths(verifier: PreTrainedModel) -> None:
    """Rows accept different numbers of tokens, and end at different times."""
    ids = prompt(7, rows=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    draft = knowing(verifier)
    expected = generated(verifier, ids, attention_mask=mask)
    end = int(expected[1, 12])
    for settings in ({}, {"eos_token_id": end, "pad_token_id": 0}):
        expected = generated(verifier, ids, attention_mask=mask, **settings)
        found = speculated(draft, ids, attention_mask=mask, num_draft_tokens=3, **settings)
        assert torch.equal(found.sequences, expected)
    assert len({tuple(steps) for steps in found.accepted}) > 1


def test_a_state_that_was_taken_back_is_that_of_the_accepted_tokens(
    verifier: PreTrainedModel,
) -> None:
    """Against a cache that was never given a rejected token."""
    from speculators.decode.tree import chain, shape_of

    tokens, counts = prompt(6, rows=2), (2, 4)
    linear = linear_layers(verifier)
    assert linear == (0, 1, 2)
    shape = shape_of(chain(3), DEVICE)
    cache = BlockCache([0, 0], linear)
    with torch.no_grad(), VerifierPass(verifier, cache, 20) as verifier_pass:
        verifier_pass.prefill(prompt(5, rows=2), None, None)
        tree = shape.tree(tokens[:, :4])
        verifier_pass.verify(tree)
        verifier_pass.keep(tree, [list(range(count)) for count in counts])
    for row, count in enumerate(counts):
        ids = torch.cat((prompt(5, rows=2)[row], tokens[row, :count]))[None]
        once = BlockCache([0], linear)
        with torch.no_grad(), VerifierPass(verifier, once, 20) as verifier_pass:
            verifier_pass.prefill(ids, None, None)
        for number in linear:
            for mine, theirs in zip(
                states_of(cache.layers[number]), states_of(once.layers[number]), strict=True
            ):
                torch.testing.assert_close(mine[row], theirs[0], atol=1e-4, rtol=1e-3)


def states_of(layer: Any) -> Sequence[Tensor]:
    kept = (layer.conv_states, layer.recurrent_states)
    return [
        it for states in kept for it in (states.values() if isinstance(states, dict) else [states])
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_output_is_the_verifiers_up_to_rounding(kind: str) -> None:
    """Each token is the best one by the same weights in float32, or as good up to rounding.

    Without the state being taken back, some tokens are worse by 40 times the rounding.
    """
    rounded, exact = (verifier_of(kind, context=0.05).bfloat16() for _ in range(2))
    exact.float()
    length = 5
    found = speculated(knowing(rounded), prompt(length), num_draft_tokens=3)
    assert len(set(found.accepted[0])) > 1
    tokens = found.sequences
    with torch.no_grad():
        best, other = (one(tokens[:, :-1]).logits[0, length - 1 :] for one in (exact, rounded))
    rounding = (best - other).abs().amax(1)
    gaps = best.amax(1) - best.gather(1, tokens[0, length:, None])[:, 0]
    assert (gaps <= 4 * rounding).all()


def test_sampling_starts_from_the_right_state() -> None:
    """With a top_k of 1, sampling has one outcome: the greedy one."""
    verifier = verifier_of("qwen3_next")
    draft = knowing(verifier)
    settings = {"do_sample": True, "top_k": 1, "num_draft_tokens": 3, "proposal": "sampling"}
    assert torch.equal(
        speculated(draft, prompt(5), **settings).sequences, generated(verifier, prompt(5))
    )


def test_inputs_of_layers_are_kept_for_blocks_and_not_for_prompts(
    verifier: PreTrainedModel,
) -> None:
    """For a long prompt, it would take more memory than the state that linear attention keeps."""
    attention: Any = verifier.get_submodule("model.layers.0.linear_attn")
    head = verifier.get_output_embeddings()
    given: list[weakref.ref[Tensor]] = []
    kept: list[bool] = []

    def note(_: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append(weakref.ref(arguments[0] if arguments else named["hidden_states"]))

    def look(*_: object) -> None:
        kept.append(given[-1]() is not None)

    hooks = [
        attention.register_forward_pre_hook(note, with_kwargs=True),
        head.register_forward_pre_hook(look),
    ]
    speculated(guessing(verifier), prompt(9), num_draft_tokens=3)
    for hook in hooks:
        hook.remove()
    assert not kept[0]
    assert any(kept[1:])  # a block's is, since a part of it may have to be computed again


def test_trees_are_refused() -> None:
    verifier = verifier_of("qwen3_next")
    with pytest.raises(GenerationError, match=r"a single path.*choose greedy or sampling"):
        speculated(guessing(verifier), prompt(4), proposal="static_tree")


def test_images_are_refused() -> None:
    """They are inputs beside the tokens: without them, the output would be another prompt's."""
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**SIZES, "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4}
    text |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    sizes = {"intermediate_size": 16, "num_position_embeddings": 16, "patch_size": 4}
    torch.manual_seed(1)
    verifier = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision | sizes, image_token_id=40)
    ).eval()
    verifier.to(DEVICE)
    verifier.generation_config.update(eos_token_id=None, pad_token_id=0)
    draft, ids = guessing(verifier), prompt(6)
    images = {"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(GenerationError, match=r"tokens only, and no pixel_values; leave it out"):
        speculated(draft, ids, **images)
    types = torch.zeros_like(ids)
    found = speculated(draft, ids, mm_token_type_ids=types)  # as its processor makes it for text
    assert torch.equal(found.sequences, generated(verifier, ids))


def test_hooks_are_gone_afterwards() -> None:
    verifier = verifier_of("qwen3_next")
    speculated(knowing(verifier), prompt(4))
    assert not any(module._forward_pre_hooks for module in verifier.modules())
