"""Verifiers and drafts that ``device_map`` has spread over devices, or offloaded.

The tests that need one GPU or two are skipped on machines with fewer.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from speculators.decode import Generation, speculate
from speculators.errors import VerifierError
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator
from tiny_models import knowing_draft, prompt, tiny_verifier
from toy_draft import ToyDraft

PROPOSALS: dict[str, ProposalMethod | str] = {
    "greedy": "greedy",
    "sampling": "sampling",
    "static_tree": "static_tree",
    "dynamic_tree": ProposalMethod(
        proposal_type="dynamic_tree", speculative_tokens=14, tree_depth=3, tree_top_k=4
    ),
}
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())

# If a verifier's first weight is on the meta device, transformers cannot tell its device.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate")

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="there is no GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")

Map = str | Mapping[str, str | int]


def spread(
    embedding: str | int,
    first: str | int,
    second: str | int,
    norm: str | int,
    head: str | int,
) -> Map:
    """A ``device_map`` of a verifier with two layers."""
    return {
        "model.embed_tokens": embedding,
        "model.layers.0": first,
        "model.layers.1": second,
        "model.norm": norm,
        "model.rotary_emb": first if first != "disk" else "cpu",
        "lm_head": head,
    }


CPU: dict[str, Map] = {
    "one device": {"": "cpu"},
    "automatic": "auto",
    "a layer offloaded": spread("cpu", "cpu", "disk", "cpu", "cpu"),
    "the head offloaded": spread("cpu", "cpu", "cpu", "cpu", "disk"),
    "the embedding offloaded": spread("disk", "cpu", "cpu", "cpu", "cpu"),
    "all offloaded": spread("disk", "disk", "disk", "disk", "disk"),
}
ONE_GPU: dict[str, Map] = {
    "one device": {"": 0},
    "a layer offloaded": spread(0, 0, "cpu", 0, 0),
    "a layer and the head offloaded": spread(0, "disk", 0, 0, "cpu"),
    "the embedding offloaded": spread("cpu", 0, 0, 0, 0),
    "all but a layer offloaded": spread("cpu", 0, "cpu", "cpu", "cpu"),
}
TWO_GPUS: dict[str, Map] = {
    "in halves": spread(0, 0, 1, 1, 1),
    "there and back": spread(0, 1, 0, 1, 0),
    "from the second to the first": spread(1, 1, 0, 0, 0),
    "balanced": "balanced",
}
DRAFTS: dict[str, Map] = {
    "one device": {"": "cpu"},
    "automatic": "auto",
    "the layer offloaded": {"embed_tokens": "cpu", "fc": "cpu", "layers": "disk"},
    "all offloaded": {"embed_tokens": "disk", "fc": "disk", "layers": "disk"},
}


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Compute in full float32, without TF32, and draw nothing on the terminal."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    transformers_logging.disable_progress_bar()
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with verifiers and their drafts, by the verifier's name."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (
        ("llama", {}),
        ("qwen2-sliding", {}),
        ("tied", {"tie_word_embeddings": True}),
    ):
        verifier = tiny_verifier("llama" if name == "tied" else name, **config)
        verifier.save_pretrained(root / name)
        knowing_draft(verifier).save_pretrained(root / f"{name}-draft")
    return root


def loaded(
    models: Path,
    device_map: Map,
    *,
    name: str = "llama",
    draft: Map | None = None,
    attach: bool = True,
) -> EagleSpeculator:
    """A draft, on one device or spread, with its verifier, which is spread."""
    verifier = AutoModelForCausalLM.from_pretrained(
        models / name, device_map=device_map, offload_folder=models / "offloaded"
    )
    return EagleSpeculator.from_pretrained(
        models / f"{name}-draft",
        verifier=verifier if attach else None,
        device_map=draft or {"": "cpu"},
        offload_folder=models / "offloaded",
    )


def verifier_of(draft: EagleSpeculator) -> Any:
    assert draft.verifier is not None
    return draft.verifier


def inputs_of(draft: EagleSpeculator, lengths: tuple[int, ...] = (8,)) -> dict[str, Any]:
    """Prompts, on the device where a user of the spread verifier would put them."""
    there = {tensor.device for tensor in verifier_of(draft).parameters() if not tensor.is_meta}
    device = min(there, key=str, default=torch.device("cpu"))
    if gpus := [one for one in there if one.type == "cuda"]:
        device = min(gpus, key=str)
    longest = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(length, seed=length)
        mask[row, longest - length :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generated(draft: EagleSpeculator, inputs: dict[str, Any], **settings: Any) -> Generation:
    settings = {"do_sample": False, "max_new_tokens": 12} | settings
    result = draft.generate(**inputs, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    assert result.sequences.device == inputs["input_ids"].device
    return result


def check(draft: EagleSpeculator, whole: EagleSpeculator, **settings: Any) -> None:
    """A spread pair generates what its verifier does, in the steps of a pair on one device."""
    inputs = inputs_of(draft)
    result = generated(draft, inputs, **settings)
    own = verifier_of(draft).generate(**inputs, do_sample=False, max_new_tokens=12)
    assert result.sequences.tolist() == own.tolist()
    if settings.get("proposal") != "sampling":
        assert result.accepted == generated(whole, inputs_of(whole), **settings).accepted
        assert sum(result.accepted[0]) > 0


def check_batch(draft: EagleSpeculator, proposal: str) -> None:
    """Like ``check``, for a batch whose answers end at different lengths."""
    inputs = inputs_of(draft, (3, 9, 6))
    verifier = verifier_of(draft)
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": [5, 11, 17]}
    own = verifier.generate(**inputs, **settings)
    result = generated(draft, inputs, proposal=proposal, **settings)
    assert result.sequences.tolist() == own.tolist()


# On the CPU


@pytest.mark.parametrize("device_map", CPU.values(), ids=CPU.keys())
@every_proposal
def test_a_spread_verifier(models: Path, device_map: Map, proposal: ProposalMethod | str) -> None:
    check(loaded(models, device_map), loaded(models, {"": "cpu"}), proposal=proposal)


@pytest.mark.parametrize("name", ["qwen2-sliding", "tied"])
@pytest.mark.parametrize("proposal", ["greedy", "static_tree"])
def test_spread_verifiers_of_other_kinds(models: Path, name: str, proposal: str) -> None:
    everything = spread("disk", "disk", "disk", "disk", "disk")
    draft = loaded(models, everything, name=name)
    check(draft, loaded(models, {"": "cpu"}, name=name), proposal=proposal)


@pytest.mark.parametrize("device_map", DRAFTS.values(), ids=DRAFTS.keys())
@every_proposal
def test_a_spread_draft(models: Path, device_map: Map, proposal: ProposalMethod | str) -> None:
    draft = loaded(models, CPU["the head offloaded"], draft=device_map)
    check(draft, loaded(models, {"": "cpu"}), proposal=proposal)


@pytest.mark.parametrize("proposal", ["greedy", "sampling"])
def test_a_batch_of_unequal_prompts(models: Path, proposal: str) -> None:
    check_batch(loaded(models, CPU["a layer offloaded"]), proposal)


def check_several_layers(models: Path, device_map: Map, where: str | int) -> None:
    """A draft reads hidden states of layers that may be on different devices."""
    whole = verifier_of(loaded(models, {"": "cpu"}))
    draft = ToyDraft(whole, (2, 0, 1)).to(where)
    spread_pair = loaded(models, device_map)
    inputs = inputs_of(spread_pair)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    own = verifier_of(spread_pair).generate(**inputs, **settings)
    for name in ("greedy", "dynamic_tree"):
        proposal = ProposalMethod(proposal_type=name)
        result = speculate(draft, verifier_of(spread_pair), proposal=proposal, **inputs, **settings)
        assert result.sequences.tolist() == own.tolist()
        alone = speculate(draft.to("cpu"), whole, prompt(8, seed=8), proposal=proposal, **settings)
        draft.to(where)
        assert result.accepted == alone.accepted
        assert sum(result.accepted[0]) > 0


@pytest.mark.parametrize("device_map", CPU.values(), ids=CPU.keys())
def test_several_layers_of_a_spread_verifier(models: Path, device_map: Map) -> None:
    check_several_layers(models, device_map, "cpu")


def test_sampling_draws_what_it_draws_on_one_device(models: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.3, "proposal": "sampling"}
    found = []
    for device_map in ({"": "cpu"}, CPU["all offloaded"]):
        draft = loaded(models, device_map)
        torch.manual_seed(3)
        found.append(generated(draft, inputs_of(draft), **settings).sequences.tolist())
    assert found[0] == found[1]


def test_an_offloaded_head_makes_the_drafts_logits(models: Path) -> None:
    draft, whole = loaded(models, CPU["all offloaded"]), loaded(models, {"": "cpu"})
    head = verifier_of(draft).get_output_embeddings()
    states = torch.randn(1, 3, 32)
    assert head.weight.is_meta
    with torch.no_grad():
        assert torch.equal(draft.logits(states), whole.logits(states))
    assert head.weight.is_meta


def test_a_draft_takes_an_offloaded_embedding(models: Path) -> None:
    whole = loaded(models, {"": "cpu"})
    draft = loaded(models, CPU["all offloaded"])
    # The draft's embedding is a copy of the verifier's.
    whole.embed_tokens = draft.embed_tokens = None
    check(draft, whole, proposal="greedy")


def test_an_offloaded_draft_borrows_the_head(models: Path, tmp_path: Path) -> None:
    """The head read from the verifier's files is on the device where the draft computes."""
    whole = loaded(models, {"": "cpu"})
    config = dict(whole.config.speculators_config or {})
    config["verifier"] = {"name_or_path": str(models / "llama"), "architectures": []}
    whole.config.speculators_config = config
    whole.save_pretrained(tmp_path / "draft")
    draft = EagleSpeculator.from_pretrained(
        tmp_path / "draft", device_map=DRAFTS["all offloaded"], offload_folder=tmp_path / "offload"
    )
    ids, states = prompt(4), torch.randn(1, 4, 32)
    with torch.no_grad():
        assert torch.equal(draft(ids, states).logits, whole(ids, states).logits)


def test_a_verifier_without_values_is_refused() -> None:
    with torch.device("meta"):
        empty = type(tiny_verifier())(tiny_verifier().config)
    draft = knowing_draft(tiny_verifier())
    with pytest.raises(VerifierError, match="meta device"):
        draft.attach_verifier(empty)


# On a GPU


@one_gpu
@pytest.mark.parametrize("device_map", ONE_GPU.values(), ids=ONE_GPU.keys())
@pytest.mark.parametrize("where", [0, "cpu"])
@every_proposal
def test_with_a_gpu(
    models: Path, device_map: Map, where: str | int, proposal: ProposalMethod | str
) -> None:
    draft = loaded(models, device_map, draft={"": where})
    check(draft, loaded(models, {"": 0}, draft={"": where}), proposal=proposal)


@one_gpu
def test_a_spread_draft_with_a_gpu(models: Path) -> None:
    maps: tuple[Map, ...] = ({"embed_tokens": "cpu", "fc": 0, "layers": "cpu"}, "auto")
    for device_map in maps:
        draft = loaded(models, {"": 0}, draft=device_map)
        check(draft, loaded(models, {"": 0}, draft={"": 0}), proposal="dynamic_tree")


@one_gpu
def test_a_batch_with_a_gpu(models: Path) -> None:
    for device_map in ONE_GPU.values():
        check_batch(loaded(models, device_map, draft={"": 0}), "greedy")


# On two GPUs


@two_gpus
@pytest.mark.parametrize("device_map", TWO_GPUS.values(), ids=TWO_GPUS.keys())
@pytest.mark.parametrize("where", [0, 1])
@every_proposal
def test_over_two_gpus(
    models: Path, device_map: Map, where: int, proposal: ProposalMethod | str
) -> None:
    draft = loaded(models, device_map, draft={"": where})
    check(draft, loaded(models, {"": 0}, draft={"": 0}), proposal=proposal)


@two_gpus
@pytest.mark.parametrize("device_map", TWO_GPUS.values(), ids=TWO_GPUS.keys())
@pytest.mark.parametrize("where", [0, 1])
def test_several_layers_over_two_gpus(models: Path, device_map: Map, where: int) -> None:
    check_several_layers(models, device_map, where)


@two_gpus
@pytest.mark.parametrize("name", ["qwen2-sliding", "tied"])
@pytest.mark.parametrize("proposal", ["greedy", "static_tree"])
def test_verifiers_of_other_kinds_over_two_gpus(models: Path, name: str, proposal: str) -> None:
    # Tied matrices must be on one device.
    device_map = spread(0, 0, 1, 1, 0 if name == "tied" else 1)
    draft = loaded(models, device_map, name=name, draft={"": 1})
    whole = loaded(models, {"": 0}, name=name, draft={"": 0})
    check(draft, whole, proposal=proposal)


@two_gpus
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("proposal", ["greedy", "sampling"])
def test_a_batch_over_two_gpus(models: Path, where: int, proposal: str) -> None:
    check_batch(loaded(models, TWO_GPUS["in halves"], draft={"": where}), proposal)


@two_gpus
def test_each_model_on_a_gpu_of_its_own(models: Path) -> None:
    whole = loaded(models, {"": 0}, draft={"": 0})
    for verifier, draft in ((0, 1), (1, 0)):
        check(loaded(models, {"": verifier}, draft={"": draft}), whole, proposal="dynamic_tree")


@two_gpus
def test_a_draft_over_two_gpus(models: Path) -> None:
    halves: Map = {"embed_tokens": 0, "fc": 0, "layers": 1}
    whole = loaded(models, {"": 0}, draft={"": 0})
    verifiers: tuple[Map, ...] = (TWO_GPUS["in halves"], {"": 0})
    for verifier in verifiers:
        for proposal in PROPOSALS.values():
            check(loaded(models, verifier, draft=halves), whole, proposal=proposal)


@two_gpus
@pytest.mark.parametrize("where", [0, 1])
def test_sampling_over_two_gpus(models: Path, where: int) -> None:
    """With top_k = 1 the result must be the best token, whichever was proposed."""
    draft = loaded(models, TWO_GPUS["in halves"], draft={"": where})
    inputs = inputs_of(draft)
    own = verifier_of(draft).generate(**inputs, do_sample=False, max_new_tokens=12)
    for proposal in PROPOSALS.values():
        one = generated(draft, inputs, proposal=proposal, do_sample=True, top_k=1)
        assert one.sequences.tolist() == own.tolist()
        many = generated(draft, inputs, proposal=proposal, do_sample=True, top_p=0.9)
        assert many.sequences.shape == own.shape
