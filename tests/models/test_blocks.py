"""A matrix that is upcast where it is used computes as a float32 copy of it does."""

import pytest
import torch
from torch import Tensor, nn

from speculators.models import blocks as module
from speculators.models.blocks import UpcastMatrix, all_finite, row_blocks, upcast


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, so that the last one is smaller."""
    monkeypatch.setattr(module, "BLOCK", 3 * 8)


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def stored(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(10, 8).to(request.param)


def test_blocks_cover_all_rows() -> None:
    assert list(row_blocks((10, 8))) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_blocks((2, 100))) == [(0, 1), (1, 2)]
    assert list(row_blocks((0, 8))) == []


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(stored: Tensor, bias: bool) -> None:
    linear = nn.Linear(8, 10, bias=bias)
    x = torch.randn(2, 5, 8)
    linear.weight = nn.Parameter(stored.float())
    expected = linear(x)
    linear.weight = nn.Parameter(upcast(stored), requires_grad=False)
    assert isinstance(linear.weight, UpcastMatrix)
    assert torch.allclose(linear(x), expected, atol=1e-6)


def test_an_embedding(stored: Tensor) -> None:
    ids = torch.tensor([[9, 0], [3, 3]])
    embedding = nn.Embedding.from_pretrained(upcast(stored))
    assert torch.equal(embedding(ids), stored.float()[ids])


def test_anything_else(stored: Tensor) -> None:
    matrix, x = upcast(stored), torch.randn(5, 8)
    assert torch.equal(x @ matrix.T, x @ stored.float().T)
    assert torch.equal(matrix[2], stored[2].float())
    assert torch.equal(matrix[:, 3], stored[:, 3].float())
    for rows in (slice(3, 7), slice(-2, None), slice(1, 9, 3), slice(5, 2), slice(None)):
        assert torch.equal(matrix[rows], stored[rows].float())
    assert torch.equal(torch.cat([matrix, matrix]), torch.cat([stored, stored]).float())
    assert type(matrix + 1) is Tensor


def test_it_looks_like_float32(stored: Tensor) -> None:
    matrix = upcast(stored)
    assert (matrix.dtype, matrix.shape, matrix.device) == (torch.float32, (10, 8), stored.device)
    assert matrix.to(torch.float32) is matrix


def test_what_needs_no_upcast_stays(stored: Tensor) -> None:
    single, integers = stored.float(), torch.arange(3)
    assert upcast(single) is single
    assert upcast(integers) is integers
    assert torch.equal(upcast(stored[0]), stored[0].float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (9, 7)])
def test_what_is_not_finite_is_found_in_any_block(
    stored: Tensor, value: float, place: tuple[int, int]
) -> None:
    largest = torch.finfo(stored.dtype).max
    stored[place] = largest
    assert all_finite(upcast(stored))
    assert all_finite(stored)
    stored[place] = value
    assert not all_finite(upcast(stored))
    assert not all_finite(stored)
    assert not all_finite(stored.flatten())


def test_scalars_and_empty_tensors_are_finite() -> None:
    assert all_finite(torch.zeros(()))
    assert all_finite(torch.zeros(0, 4))
    assert not all_finite(torch.tensor(torch.nan))
