"""What runs as one kernel while a step is recorded computes what transformers' kernels compute.

These tests need Triton, and a GPU or ``TRITON_INTERPRET=1``, with which its kernels run on a CPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from speculators.decode.cache import BlockCache
from speculators.decode.gpu import fusion
from tiny_models import prompt, tiny_verifier

triton = pytest.importorskip("triton")

from speculators.decode.gpu import kernels  # noqa: E402

DEVICE = torch.device("cpu" if kernels.INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not (kernels.INTERPRETED or torch.cuda.is_available()), reason="there is no GPU"
)
# The interpreter does not know bfloat16.
DTYPES = [torch.float32, torch.float16 if kernels.INTERPRETED else torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def heads(*shape: int, dtype: torch.dtype) -> Tensor:
    """(rows, heads, length, head size), as a layer makes them: length before heads in memory."""
    rows, number, length, size = shape
    return random(rows, length, number, size, dtype=dtype).transpose(1, 2)


def difference(found: Tensor, expected: Tensor) -> float:
    """On average, in units of the dtype's spacing at 1, relative to the size."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    spacing = torch.finfo(found.dtype).eps
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().mean() / expected.abs().mean() / spacing).item()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@every_dtype
def test_norms(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(72, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(72, dtype=dtype)
    x = random(2, 5, 72, dtype=dtype)
    found = kernels.rms_norm(x, norm.weight, 1e-5)
    assert difference(found, norm(x)) < (0.05 if dtype.itemsize < 4 else 2)


@every_dtype
@pytest.mark.parametrize("layout", ["parts", "columns", "one for all"])
def test_norms_of_vectors_that_are_apart(layout: str, dtype: torch.dtype) -> None:
    """As EAGLE-3.1's norms of the verifier's states, and latent attention's, take them."""
    norm = LlamaRMSNorm(24, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(24, dtype=dtype)
    x = {
        "parts": random(2, 5, 72, dtype=dtype)[..., 24:48],
        "columns": random(2, 24, 5, dtype=dtype).transpose(1, 2),
        "one for all": random(1, 1, 24, dtype=dtype).expand(2, 5, 24),
    }[layout]
    found = kernels.rms_norm(x, norm.weight, 1e-5)
    assert difference(found, norm(x)) < (0.05 if dtype.itemsize < 4 else 2)
    assert found.is_contiguous()


@every_dtype
def test_products_with_silu(dtype: torch.dtype) -> None:
    gate, up = random(3, 5, 700, dtype=dtype), random(3, 5, 700, dtype=dtype)
    found = kernels.gated_silu(gate, up)
    assert difference(found, nn.functional.silu(gate) * up) < (0.05 if dtype.itemsize < 4 else 2)


@every_dtype
@pytest.mark.parametrize("angles", [1, 3])
def test_rotary_embeddings(angles: int, dtype: torch.dtype) -> None:
    queries, keys = heads(3, 6, 5, 24, dtype=dtype), heads(3, 2, 5, 24, dtype=dtype)
    cos, sin = random(angles, 5, 24, dtype=dtype), random(angles, 5, 24, dtype=dtype)
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    for one, other in zip(kernels.rotate(queries, keys, cos, sin), expected, strict=True):
        assert difference(one, other) < (0.05 if dtype.itemsize < 4 else 2)
        assert one.stride() == other.transpose(1, 2).contiguous().transpose(1, 2).stride()


@every_dtype
@pytest.mark.parametrize("apart", [False, True])
def test_writing_to_a_cache(apart: bool, dtype: torch.dtype) -> None:
    keys, values = (torch.zeros(2, 3, 30, 24, device=DEVICE, dtype=dtype) for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    new_keys, new_values = heads(2, 3, 4, 24, dtype=dtype), heads(2, 3, 4, 24, dtype=dtype)
    if apart:
        new_values = random(2, 3, 24, 4, dtype=dtype).transpose(2, 3)
    at = torch.tensor([[3, 4, 5, 6], [20, 21, 22, 23]], device=DEVICE)
    kernels.write(keys, values, new_keys, new_values, at)
    BlockCache.write(expected_keys, expected_values, new_keys, new_values, at)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@every_dtype
@pytest.mark.parametrize(
    ("rows", "query_heads", "groups", "nodes", "slots", "size"),
    [
        (1, 9, 3, 4, 256, 64),
        (3, 4, 2, 7, 1100, 16),  # split up among several programs
        (2, 4, 4, 30, 80, 24),
        (2, 2, 1, 1, 2048, 128),
        (1, 6, 2, 100, 128, 64),
    ],
)
def test_attention(
    rows: int, query_heads: int, groups: int, nodes: int, slots: int, size: int, dtype: torch.dtype
) -> None:
    queries = heads(rows, query_heads, nodes, size, dtype=dtype)
    keys, values = (random(rows, groups, slots + 5, size, dtype=dtype) for _ in range(2))
    # A column of a larger tensor, as in a recording.
    starts = torch.randint(0, slots - nodes, (rows, 5), device=DEVICE)[:, 2:3]
    starts[0] = slots - nodes
    for states in (keys, values):  # what is not in use is not read
        for row, start in enumerate(starts[:, 0].tolist()):
            states[row, :, start + nodes :] = float("nan")
    keys, values = keys[:, :, :slots], values[:, :, :slots]
    places = torch.arange(slots, device=DEVICE)
    hidden = places > (starts + torch.arange(nodes, device=DEVICE))[:, :, None]
    hidden |= torch.rand(rows, nodes, slots, device=DEVICE) < 0.2
    hidden[:, :, 0] = False
    mask = (hidden.to(dtype) * torch.finfo(dtype).min)[:, None]
    found = kernels.attend(queries, keys, values, mask, starts, nodes, 0.17)
    keys, values = (
        states.nan_to_num(0).double().repeat_interleave(query_heads // groups, 1)
        for states in (keys, values)
    )
    expected = nn.functional.scaled_dot_product_attention(
        queries.double(), keys, values, attn_mask=~hidden[:, None], scale=0.17
    )
    assert difference(found, expected.transpose(1, 2).to(dtype)) < (1 if dtype.itemsize < 4 else 20)


@pytest.mark.parametrize("kind", ["chain", "block", "rows", "window", "window and block"])
@pytest.mark.parametrize("padding", [[0, 0, 0], [4, 0, 1]])
def test_masks(kind: str, padding: list[int]) -> None:
    cache = BlockCache(padding)
    cache.unconfirmed = 0 if "window" in kind else 2
    nodes = cache.unconfirmed + 5
    lengths = torch.tensor([[7, 1], [40, 2], [3, 3]], device=DEVICE)[:, 0]
    settings: dict[str, Any] = {}
    if "block" in kind or kind == "rows":
        seen = torch.rand(3 if kind == "rows" else 1, 5, nodes, device=DEVICE) < 0.5
        settings["block"] = seen
    if "window" in kind:
        depths = torch.randint(0, 5, (3 if "block" in kind else 1, 5), device=DEVICE)
        settings |= {"window": 6, "depths": depths}
    pads = torch.tensor([padding, padding], device=DEVICE).T[:, 0] if any(padding) else None
    for dtype in DTYPES:
        with cache.recording(lengths, pads, 64):
            cache.unconfirmed = nodes - 5
            expected = cache.mask(5, dtype, DEVICE, **settings)
            found = fusion.mask(cache, 5, dtype, DEVICE, **settings)
        assert torch.equal(found, expected)  # type: ignore[arg-type]


@every_dtype
def test_other_norms_and_activations_are_left_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's norms add 1 to their weights; OLMo's round in another place."""
    monkeypatch.setattr(fusion, "AGREES", {})
    config: Any = tiny_verifier().config

    def agrees(module: nn.Module) -> bool:
        module.to(DEVICE, dtype)
        x = random(2, 8, 32, dtype=dtype)
        replacement = fusion.replacement_of(module)
        assert replacement is not None
        expected = module(x)
        difference(replacement(x), expected)
        return fusion.AGREES[type(replacement), replacement.key(x)]

    assert agrees(LlamaRMSNorm(32))
    assert not agrees(GemmaRMSNorm(32))
    if dtype.itemsize < 4:
        norm = Olmo2RMSNorm(32)
        norm.weight.data = random(32, dtype=torch.float32)
        assert not agrees(norm)
    assert agrees(LlamaMLP(config))
    config.hidden_act = "gelu"
    assert not agrees(LlamaMLP(config))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_models_run_as_they_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "AGREES", {})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(name, **sizes, initializer_range=0.3)
    verifier: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    verifier.to(DEVICE).eval()
    # Another one, in a module of transformers that has the same table of attention functions.
    both = nn.ModuleList([verifier, tiny_verifier("qwen2").to(DEVICE)])  # type: ignore[arg-type]
    ids = prompt(12, rows=2).to(DEVICE)
    found = []
    for fuse in (False, True):
        cache = BlockCache([0, 3])
        lengths, padding = torch.zeros(2, dtype=torch.long, device=DEVICE), torch.tensor([0, 3])
        with cache.recording(lengths, padding.to(DEVICE), 32):
            mask = cache.mask(12, torch.float32, DEVICE)
            settings: dict[str, Any] = {
                "attention_mask": mask,
                "position_ids": cache.positions(torch.arange(12, device=DEVICE), DEVICE).clamp(0),
                "past_key_values": cache,
            }
            if fuse:
                with fusion.fused(both, cache):
                    found.append(verifier(ids, **settings).logits[:, 3:])
            else:
                found.append(verifier(ids, **settings).logits[:, 3:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    kinds = {kind.__name__: agrees for (kind, _), agrees in fusion.AGREES.items()}
    originals = [key[0] for kind, key in fusion.AGREES if kind is fusion.Attention]  # type: ignore[index]
    assert originals == [sdpa_attention_forward]
    assert kinds["Attention"]
    assert kinds["Rotary"]
    assert kinds["Norm"] == (name != "gemma2")
    assert "forward" not in vars(verifier.get_decoder().norm)
