"""Steps that are recorded once and replayed give the same results as steps that are run.

On a machine with a GPU they are recorded there as CUDA graphs. Elsewhere a stand-in for a graph
runs the function again, and writes the results into the tensors of the first run, as a graph does.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    EtaLogitsWarper,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from block_drafts import knowing_dflash
from distributions import SETTINGS, TOKENS, analytic, chi_square_is_likely, small_verifier
from eagle3 import knowing_eagle3
from speculators.decode import Generation, Workspace, speculate
from speculators.decode.cache import BlockCache
from speculators.decode.gpu import cuda_graphs as graphs
from speculators.decode.verification import VerifierPass
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator
from speculators.models.eagle3 import Eagle3Speculator
from speculators.models.speculator import Speculator
from tiny_models import SIZES, VERIFIERS, knowing_draft, prompt, tiny_verifier
from toy_draft import ToyDraft

SMALL_TREE = ProposalMethod(
    proposal_type="dynamic_tree", speculative_tokens=14, tree_depth=3, tree_top_k=4
)
PROPOSALS: dict[str, ProposalMethod | str] = {
    "one token": ProposalMethod(speculative_tokens=1),
    "chain": ProposalMethod(speculative_tokens=4),
    "drawn chain": ProposalMethod(proposal_type="sampling", speculative_tokens=4),
    "static tree": "static_tree",
    "dynamic tree": SMALL_TREE,
}
LESS = ("one token", "static tree")
"""Those that a test leaves to ``exhaustive`` if others are much like them."""

PAIRS = [
    ("llama", "one token"),
    ("llama", "drawn chain"),
    ("llama", "static tree"),
    ("mistral-sliding", "chain"),
    ("qwen2-sliding", "dynamic tree"),
]


def pairs(chosen: Sequence[tuple[str, str]], among: Sequence[str]) -> pytest.MarkDecorator:
    """Some verifiers with some proposals; ``exhaustive`` has every verifier with every proposal."""
    # In some releases of transformers, MoE layers choose their experts on the host.
    names = [name for name in VERIFIERS if name != "mixtral"]
    others = [(name, one) for name in names for one in among if (name, one) not in chosen]
    marked = [pytest.param(*one, marks=pytest.mark.exhaustive) for one in others]
    return pytest.mark.parametrize(("name", "proposal"), [*chosen, *marked])


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Again:
    """A stand-in for a CUDA graph, which runs the function again.

    Attributes:
        recording: whether a recording is being made.

    """

    recording = False

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        assert device == DEVICE
        self._run = run
        Again.recording = True
        try:
            with torch.random.fork_rng([]):  # recording draws no random numbers
                self.result = run()
        finally:
            Again.recording = False

    def replay(self) -> None:
        """Run the function, and write its results into those of the first run."""
        copy_tensors(self._run(), self.result)


def copy_tensors(source: Any, to: Any) -> None:
    """Copy tensors, tuples of them, or the tensors of a tree."""
    if isinstance(source, Tensor):
        to.copy_(source)
    elif isinstance(source, tuple):
        for one, other in zip(source, to, strict=True):
            copy_tensors(one, other)
    elif source is not None:
        for name in ("tokens", "parents", "depths", "ancestors", "probabilities"):
            if getattr(source, name) is not getattr(to, name):
                copy_tensors(getattr(source, name), getattr(to, name))


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start with few slots, so that they soon have to grow; on a CPU, record with ``Again``."""
    monkeypatch.setattr(graphs, "MIN_SLOTS", 32)
    monkeypatch.setattr(graphs, "RESERVED_TOKENS", 8)
    if DEVICE.type == "cpu":
        monkeypatch.setitem(graphs.RECORDERS, "cpu", Again)
        # A function that runs again later needs the same hidden states of the verifier as before.
        monkeypatch.setattr(VerifierPass, "__exit__", lambda *_: None)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def pair(name: str = "llama") -> tuple[PreTrainedModel, EagleSpeculator]:
    """A verifier, and a draft that is often right."""
    verifier = tiny_verifier(name)
    draft = knowing_draft(verifier)
    verifier.to(DEVICE)  # type: ignore[arg-type]
    draft.to(DEVICE)  # type: ignore[arg-type]
    return verifier, draft


def ids_of(length: int, seed: int = 0) -> Tensor:
    return prompt(length, seed).to(DEVICE)


def generated(draft: Speculator, ids: Tensor, *, seed: int = 0, **settings: Any) -> Generation:
    torch.manual_seed(seed)
    settings = {"do_sample": False, "max_new_tokens": 16} | settings
    result = draft.generate(ids, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def recordings(draft: Speculator) -> int:
    return sum(one is not None for one in draft._workspace.recordings.values())


def check_same(draft: Speculator, ids: Tensor, **settings: Any) -> None:
    """Replaying and running give the same tokens in the same steps, and those of the verifier."""
    run = generated(draft, ids, cuda_graphs=False, **settings)
    replayed = generated(draft, ids, **settings)
    assert replayed.sequences.tolist() == run.sequences.tolist()
    assert (replayed.accepted, replayed.offered) == (run.accepted, run.offered)
    if not settings.get("do_sample"):
        verifier: Any = draft.verifier
        new = settings.get("max_new_tokens", 16)
        own = verifier.generate(ids, do_sample=False, max_new_tokens=new)
        assert replayed.sequences.tolist() == own.tolist()


@pairs(PAIRS, tuple(PROPOSALS))
def test_replayed_steps_are_the_steps(name: str, proposal: str) -> None:
    _, draft = pair(name)
    # Prompts with their outputs need fewer, and more, slots than one recording has.
    for length, new in ((1, 8), (9, 70), (5, 12), (50, 20)):
        ids = ids_of(length, seed=length)
        check_same(draft, ids, proposal=PROPOSALS[proposal], max_new_tokens=new)
        assert recordings(draft) > 0
    assert draft._workspace.prompts


def test_a_verifier_with_latent_attention() -> None:
    """Its norms run on parts of what a projection gives."""
    sizes: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
    sizes |= {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    torch.manual_seed(1)
    config = DeepseekV3Config(
        **{**SIZES, **sizes},
        num_hidden_layers=2,
        first_k_dense_replace=2,  # no layer has experts
        initializer_range=0.5,
    )
    verifier: Any = DeepseekV3ForCausalLM(config).eval()
    verifier.generation_config.update(eos_token_id=None, pad_token_id=0)
    draft = knowing_draft(verifier)
    verifier.to(DEVICE)
    draft.to(DEVICE)  # type: ignore[arg-type]
    for length in (1, 9):
        check_same(draft, ids_of(length), proposal=PROPOSALS["chain"])
    assert recordings(draft) > 0


def batch_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded at the left, and their mask."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=DEVICE)
    for row, length in enumerate(lengths):
        ids[row, ids.shape[1] - length :] = ids_of(length, seed=row)[0]
    places = torch.arange(ids.shape[1], device=DEVICE).flip(0)
    return ids, (places < torch.tensor(lengths, device=DEVICE)[:, None]).long()


def check_batch(draft: Speculator, lengths: Sequence[int], **settings: Any) -> None:
    """As ``check_same``, for a batch of which each row ends at another time."""
    ids, mask = batch_of(*lengths)
    defaults: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    settings = defaults | settings
    first = (
        generated(draft, ids, cuda_graphs=False, **settings).sequences[0, ids.shape[1] :].tolist()
    )
    settings["eos_token_id"] = max(first, key=first.index)  # the one that comes up last
    run = generated(draft, ids, cuda_graphs=False, **settings)
    for _ in range(2):  # prefill is recorded the second time
        replayed = generated(draft, ids, **settings)
        assert replayed.sequences.tolist() == run.sequences.tolist()
        assert (replayed.accepted, replayed.offered) == (run.accepted, run.offered)
    del settings["proposal"]
    verifier: Any = draft.verifier
    own = verifier.generate(ids, do_sample=False, **settings)
    assert replayed.sequences.tolist() == own.tolist()


@pairs(PAIRS[2:], ("one token", "chain", "static tree", "dynamic tree"))
def test_batches(name: str, proposal: str) -> None:
    _, draft = pair(name)
    for lengths in ((5, 9), (6,), (1, 30, 12, 2, 9)):
        check_batch(draft, lengths, proposal=PROPOSALS[proposal])
    assert recordings(draft) > 0
    assert {key[0] for key in draft._workspace.prompts} == {8}  # type: ignore[index]


def test_a_batch_of_which_only_some_steps_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, draft = pair()
    made: list[str] = []
    record = graphs.RECORDERS[DEVICE.type]

    def refuse(run: Callable[[], Any], device: torch.device) -> Any:
        made.append(run.__name__)
        if made.count("propose") == 2 and run.__name__ == "propose":
            raise RuntimeError("called a synchronizing CUDA operation")
        return record(run, device)

    monkeypatch.setitem(graphs.RECORDERS, DEVICE.type, refuse)
    check_batch(draft, (5, 20, 2), proposal=PROPOSALS["chain"])
    assert None in draft._workspace.recordings.values()
    assert recordings(draft) > 0


@pytest.mark.parametrize(
    "proposal",
    [
        pytest.param(method, id=name, marks=[pytest.mark.exhaustive] * (name in LESS))
        for name, method in PROPOSALS.items()
    ],
)
def test_a_draft_that_projects_states_and_maps_tokens(proposal: ProposalMethod | str) -> None:
    verifier: Any = tiny_verifier(num_hidden_layers=3, context=0.01)
    draft = ToyDraft(verifier)
    verifier.to(DEVICE)
    draft.to(DEVICE)
    method = (
        proposal if isinstance(proposal, ProposalMethod) else ProposalMethod(proposal_type=proposal)
    )
    workspace = Workspace()
    for length, settings in (
        (1, {"do_sample": False}),
        (50, {"do_sample": False}),
        (6, {"do_sample": True, "temperature": 1.3}),
    ):
        ids = ids_of(length, seed=length)
        found = []
        for used in (None, workspace, workspace):
            torch.manual_seed(length)
            result = speculate(
                draft,
                verifier,
                ids,
                proposal=method,
                workspace=used,
                max_new_tokens=30,
                **settings,
            )
            found.append((result.sequences.tolist(), result.accepted, result.offered))
        assert found[0] == found[1] == found[2]
        assert sum(found[0][1][0]) > 0
        if not settings["do_sample"]:
            own = verifier.generate(ids, max_new_tokens=30, **settings)
            assert found[0][0] == own.tolist()
    assert sum(one is not None for one in workspace.recordings.values()) > 1


@pytest.mark.parametrize("kind", ["windows", "dflash2", "rnn"])
def test_a_draft_of_blocks(kind: str) -> None:
    verifier: Any = tiny_verifier(num_hidden_layers=3, context=0.001)
    draft = knowing_dflash(verifier, kind)
    verifier.to(DEVICE)
    draft.to(DEVICE)
    for proposal in ("greedy", "sampling"):
        for length in (1, 9, 26):
            ids = ids_of(length, seed=length)
            check_same(draft, ids, proposal=proposal, max_new_tokens=12)
    check_same(draft, ids, proposal="sampling", max_new_tokens=12, do_sample=True, top_k=9)
    assert recordings(draft) > 2
    check_batch(draft, (5, 9, 2), proposal="greedy", max_new_tokens=12)
    assert recordings(draft) > 0


def test_replayed_draws_from_some_tokens_have_the_verifiers_distribution() -> None:
    verifier: Any = small_verifier()
    draft = ToyDraft(verifier, tokens=[1, 2, 4])
    verifier.to(DEVICE)
    draft.to(DEVICE)
    workspace = Workspace()
    counts: Counter[tuple[int, ...]] = Counter()
    accepted: list[int] = []
    torch.manual_seed(0)
    for _ in range(8):
        result = speculate(
            draft,
            verifier,
            torch.tensor([[1, 3, 2]] * 50, device=DEVICE),
            proposal=ProposalMethod(proposal_type="sampling", speculative_tokens=3),
            workspace=workspace,
            do_sample=True,
            max_new_tokens=TOKENS,
            **SETTINGS["plain"],
        )
        counts.update(map(tuple, result.sequences[:, 3:].tolist()))
        for row in result.accepted:
            accepted += row
    assert list(workspace.recordings.values()) != [None]
    assert chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], SETTINGS["plain"]))
    assert sum(accepted) > len(accepted) / 5


@pytest.fixture(
    params=[pytest.param("eagle3", marks=pytest.mark.exhaustive), "eagle31", "parallel"]
)
def eagle3_draft(request: pytest.FixtureRequest) -> Eagle3Speculator:
    """A draft that reads several layers, and often predicts its verifier."""
    kinds: dict[str, dict[str, Any]] = {
        "eagle3": {},
        "eagle31": {"fc_norm": True, "norm_output": True},
        "parallel": {"parallel": True},
    }
    verifier = tiny_verifier(num_hidden_layers=3, context=0.003)
    draft = knowing_eagle3(verifier, **kinds[request.param])
    verifier.to(DEVICE)  # type: ignore[arg-type]
    draft.to(DEVICE)  # type: ignore[arg-type]
    return draft


@pytest.mark.parametrize("proposal", ["chain", "drawn chain", "dynamic tree"])
def test_eagle3_drafts(eagle3_draft: Eagle3Speculator, proposal: str) -> None:
    if eagle3_draft.config.parallel and "tree" in proposal:
        pytest.skip("P-EAGLE drafts chains only")
    method = PROPOSALS[proposal]
    for length in (1, 5):
        check_same(eagle3_draft, ids_of(length), proposal=method, max_new_tokens=30)
    assert recordings(eagle3_draft) > 1
    if proposal == "drawn chain":
        check_same(eagle3_draft, ids_of(5), proposal=method, do_sample=True, temperature=0.8)


def test_recordings_are_used_again() -> None:
    _, draft = pair()
    check_same(draft, ids_of(5, seed=1))
    made = dict(draft._workspace.recordings)
    check_same(draft, ids_of(6, seed=2))
    assert draft._workspace.recordings == made
    check_same(draft, ids_of(6, seed=3), proposal="static_tree")
    assert recordings(draft) > len(made)
    check_same(draft, ids_of(6, seed=4))


def test_caches_that_grow_forget_what_was_recorded_over_them() -> None:
    _, draft = pair()
    check_same(draft, ids_of(5), max_new_tokens=4)
    first = next(iter(draft._workspace.recordings.values()))
    check_same(draft, ids_of(250), max_new_tokens=4)
    check_same(draft, ids_of(5), max_new_tokens=4)
    assert first not in draft._workspace.recordings.values()


def test_long_prompts_and_many_prompts_do_not_add_up() -> None:
    _, draft = pair()
    check_batch(draft, (3, 6, 2, 4, 5), proposal=PROPOSALS["chain"], max_new_tokens=10)
    check_same(draft, ids_of(150), max_new_tokens=4)
    cache = draft._workspace.verifier_cache
    sizes = {tuple(layer.keys.shape[:3]) for layer in cache.layers}  # type: ignore[union-attr]
    assert sizes == {(1, 2, 256)}
    check_batch(draft, (3, 6, 2, 4, 5), proposal=PROPOSALS["chain"], max_new_tokens=10)


def test_models_that_were_changed_are_recorded_anew() -> None:
    verifier, draft = pair()
    check_same(draft, ids_of(5))
    verifier.to(torch.float64)  # type: ignore[arg-type]
    check_same(draft, ids_of(5))
    draft.to(torch.float64)  # type: ignore[arg-type]
    check_same(draft, ids_of(5))
    with torch.no_grad():
        embedding: Any = verifier.get_parameter("model.embed_tokens.weight")
        embedding.data = embedding.flip(0).clone()
    check_same(draft, ids_of(5, seed=3))
    other, _ = pair()
    draft.to(torch.float32)  # type: ignore[arg-type]
    draft.attach_verifier(other)
    assert recordings(draft) == 0
    check_same(draft, ids_of(5))


def test_sampling_draws_the_same() -> None:
    _, draft = pair()
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}
    for proposal in ("greedy", "sampling", "static_tree"):
        before, found = recordings(draft), set()
        for seed in (0, 1, 0):  # the first one while the steps are recorded
            check_same(draft, ids_of(6), proposal=proposal, seed=seed, **settings)
            result = generated(draft, ids_of(6), proposal=proposal, seed=seed, **settings)
            found.add(tuple(result.sequences[0].tolist()))
        assert len(found) == 2
        assert recordings(draft) > before


DRAWN: dict[str, Any] = {"do_sample": True, "proposal": "sampling", "max_new_tokens": 8}


def test_recordings_of_drawn_chains_are_used_again_with_the_same_settings() -> None:
    _, draft = pair()
    settings: tuple[dict[str, Any], ...] = (
        {"temperature": 0.7},
        {"temperature": 0.8},
        {"top_k": 9},
        {"top_p": 0.9},
        {},
    )
    for made, setting in enumerate(settings):
        assert recordings(draft) == made
        for _ in range(2):
            check_same(draft, ids_of(6), **DRAWN, **setting)
            assert recordings(draft) == made + 1
    made = recordings(draft)
    for setting in settings:
        check_same(draft, ids_of(6), **DRAWN, **setting)
    assert recordings(draft) == made
    # Proposals that are not sampled do not depend on the settings.
    for setting in settings:
        check_same(draft, ids_of(6), **(DRAWN | {"proposal": "greedy"}), **setting)
    assert recordings(draft) == made + 1


def test_the_recordings_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_RECORDINGS", 2)
    _, draft = pair()
    kept = draft._workspace.recordings

    def last(temperature: float) -> Any:
        check_same(draft, ids_of(6), temperature=temperature, **DRAWN)
        return next(reversed(kept.values()))

    first, second = last(0.5), last(0.6)
    assert last(0.5) is first
    third = last(0.7)
    assert list(kept.values()) == [first, third]
    assert last(0.6) is not second


@pytest.mark.parametrize("name", ["plain", "top_k", "top_p"])
def test_replayed_draws_have_the_verifiers_distribution(name: str) -> None:
    settings = SETTINGS[name]
    verifier = small_verifier()
    draft = knowing_draft(verifier)
    verifier.to(DEVICE)  # type: ignore[arg-type]
    draft.to(DEVICE)  # type: ignore[arg-type]
    method = ProposalMethod(proposal_type="sampling", speculative_tokens=3)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted: list[int] = []
    torch.manual_seed(0)
    for _ in range(8):
        result = draft.generate(
            torch.tensor([[1, 3, 2]] * 50, device=DEVICE),
            proposal=method,
            do_sample=True,
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
            **settings,
        )
        assert isinstance(result, Generation)
        counts.update(map(tuple, result.sequences[:, 3:].tolist()))
        for row in result.accepted:
            accepted += row
    assert recordings(draft) == 1
    assert chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], settings))
    assert sum(accepted) > len(accepted) / 5


def test_a_setting_that_needs_the_host_is_run(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    _, draft = pair()
    if DEVICE.type == "cpu":  # on a GPU it does synchronize
        warp = EtaLogitsWarper.__call__

        def wait(*arguments: Any) -> Any:
            if Again.recording:
                raise RuntimeError("called a synchronizing CUDA operation")
            return warp(*arguments)

        monkeypatch.setattr(EtaLogitsWarper, "__call__", wait)
    for seed in range(2):
        check_same(draft, ids_of(6), eta_cutoff=0.01, seed=seed, **DRAWN)
    assert recordings(draft) == 0
    assert sum("No CUDA graphs" in line for line in log) == 1
    check_same(draft, ids_of(6), **DRAWN)
    assert recordings(draft) == 1
    check_same(draft, ids_of(6), eta_cutoff=0.01, **(DRAWN | {"proposal": "greedy"}))
    assert recordings(draft) == 2
    assert sum("No CUDA graphs" in line for line in log) == 1


def test_a_large_batch_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 25)
    _, draft = pair()
    check_batch(draft, (6, 6, 6, 6, 6), proposal=PROPOSALS["chain"])
    assert recordings(draft) > 0
    draft._workspace.clear()
    check_batch(draft, (6, 6, 6, 6, 6, 6), proposal=PROPOSALS["chain"])
    assert recordings(draft) == 0


def test_with_an_inference_mode_and_without() -> None:
    _, draft = pair()
    for mode in (True, False, True):
        with torch.inference_mode(mode=mode):
            check_same(draft, ids_of(6))


class Nested(BaseStreamer):
    """A streamer that generates with the same draft while that is generating."""

    def __init__(self, draft: EagleSpeculator) -> None:
        self.draft = draft
        self.results: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        del value
        result = generated(self.draft, ids_of(6, seed=5), max_new_tokens=8)
        self.results.append(result.sequences.tolist())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("proposal", ["greedy", "static_tree"])
def test_generations_within_each_other_without_recordings(proposal: str) -> None:
    _, draft = pair()
    settings: dict[str, Any] = {"cuda_graphs": False, "proposal": proposal, "max_new_tokens": 8}
    expected = generated(draft, ids_of(6), **settings).sequences.tolist()
    streamer = Nested(draft)
    found = generated(draft, ids_of(6), streamer=streamer, **settings)
    assert found.sequences.tolist() == expected
    assert len({str(result) for result in streamer.results}) == 1


def test_generations_at_the_same_time_keep_out_of_each_others_way() -> None:
    _, draft = pair()
    few: dict[str, Any] = {"max_new_tokens": 8}
    expected = [generated(draft, ids_of(6, seed=n), **few).sequences.tolist() for n in range(6)]
    streamer = Nested(draft)
    assert generated(draft, ids_of(6), streamer=streamer, **few).sequences.tolist() == expected[0]
    assert streamer.results == [expected[5]] * len(streamer.results)

    found: dict[int, list[list[int]]] = {}

    def work(seed: int) -> None:
        found[seed] = generated(draft, ids_of(6, seed=seed), **few).sequences.tolist()

    if DEVICE.type == "cpu":  # while one thread records, others may not use much of CUDA
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[seed] for seed in range(4)] == expected[:4]


def test_a_generation_that_fails_gives_the_workspace_back() -> None:
    _, draft = pair()

    class Failing(Nested):
        def put(self, value: Tensor) -> None:
            if value.numel() == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generated(draft, ids_of(6), streamer=Failing(draft))
    check_same(draft, ids_of(6))
    assert recordings(draft) > 0


def test_a_copy_records_for_itself() -> None:
    verifier, draft = pair()
    check_same(draft, ids_of(6))
    verifier.get_decoder()._forward_hooks.clear()  # the stand-in's, which cannot be pickled
    for other in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert recordings(other) == 0
        check_same(other, ids_of(6))
        assert recordings(other) > 0
    assert recordings(draft) > 0


def test_what_needs_the_host_is_run(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    verifier, draft = pair()
    if DEVICE.type == "cuda":

        def look(_module: object, _inputs: object, output: Tensor) -> None:
            assert not output.isnan().any()

        verifier.get_decoder().norm.register_forward_hook(look)
    else:

        def refuse(run: Callable[[], Any], device: torch.device) -> Any:
            if run.__name__ != "verify":
                return Again(run, device)
            raise RuntimeError("called a synchronizing CUDA operation\nand so on")

        monkeypatch.setitem(graphs.RECORDERS, "cpu", refuse)
    check_same(draft, ids_of(6))
    check_same(draft, ids_of(7))
    assert recordings(draft) == 0
    assert sum("No CUDA graphs" in line for line in log) == 1
    check_same(draft, ids_of(6), **DRAWN)
    assert draft._workspace.verifier_unrecordable


class Once:
    """A recording that keeps nothing but its result, like a CUDA graph, and cannot be replayed."""

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self.result = run()

    def replay(self) -> None:
        """Leave the result as it is."""


def test_what_graphs_read_lives_as_long_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that were recorded are gone, and with them what only they refer to."""
    read: list[int] = []

    class Noted(Again):
        def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
            cells = [cell.cell_contents for cell in run.__closure__ or ()]
            read.extend(addresses(cells))
            super().__init__(run, device)

    def addresses(values: Sequence[Any]) -> list[int]:
        tensors = [value for value in values if isinstance(value, Tensor)]
        return [tensor.untyped_storage().data_ptr() for tensor in tensors]

    if DEVICE.type == "cpu":
        monkeypatch.setitem(graphs.RECORDERS, "cpu", Noted)
    _, draft = pair()
    for _ in range(2):
        check_batch(draft, (5, 9), proposal=PROPOSALS["chain"])
    workspace = draft._workspace
    kept = [*workspace.recordings.values(), *workspace.prompts.values()]
    assert len(kept) > 1
    assert set(read) <= {address for one in kept for address in addresses([*vars(one).values()])}


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_caches_are_freed_at_once(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[BlockCache]] = []
    make = BlockCache.__init__

    def noted(self: BlockCache, *arguments: Any) -> None:
        make(self, *arguments)
        made.append(weakref.ref(self))

    if DEVICE.type == "cpu":
        monkeypatch.undo()  # ``Again`` keeps the function, and with it the cache
        monkeypatch.setitem(graphs.RECORDERS, "cpu", Once)
    monkeypatch.setattr(BlockCache, "__init__", noted)
    gc.disable()  # it would free them, too, but at some unknown time
    try:
        _, draft = pair()
        draft.generate(
            ids_of(6), max_new_tokens=8, do_sample=False, eos_token_id=None, cuda_graphs=cuda_graphs
        )
        assert (recordings(draft) > 0) == cuda_graphs
        del draft
        assert len(made) >= 2
        assert [cache() for cache in made] == [None] * len(made)
    finally:
        gc.enable()


@gpu
def test_a_draft_that_is_dropped_leaves_nothing_behind() -> None:
    def use() -> None:
        _, draft = pair()
        check_same(draft, ids_of(6))
        check_same(draft, ids_of(6), **DRAWN)
        check_same(draft, ids_of(6), eta_cutoff=0.01, **DRAWN)
        assert recordings(draft) > 0

    use()  # what libraries keep allocated for good
    gc.collect()
    before = torch.cuda.memory_allocated()
    use()
    assert torch.cuda.memory_allocated() == before
