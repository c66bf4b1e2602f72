"""Running parts of a model that transformers writes as many small kernels as one kernel each.

While a step is recorded, norms, rotary embeddings, the products of gated MLPs, attention, its masks
and writing to the cache are replaced by the functions of ``kernels``; the rest is the model's own
code. A part of a model is replaced only if the results are the same up to the order of sums: both
are compared the first time, on random inputs, so that a model that does something else runs as it
is.
"""

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache as remembered
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from speculators.decode.cache import BlockCache

__all__ = ["fused"]

ROTARY = "apply_rotary_pos_emb"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Names in transformers' modules: of the function that rotates queries and keys, and of the table
of attention functions."""

GATED = ("gate_proj", "up_proj", "down_proj")
"""The parts of a gated MLP."""

ATTENTION = "sdpa"
"""The attention implementation that may be replaced; others were asked for on purpose."""

AGREES: dict[tuple[type["Replacement"], Hashable], bool] = {}
"""By what was replaced and for which dtype and sizes, whether the results were the same."""


@remembered
def kernels() -> Any:
    """The module ``kernels``; ``None`` where there is no Triton."""
    if find_spec("triton") is None:
        return None
    from speculators.decode.gpu import kernels as module

    return module


@remembered
def works_on(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device, and run there."""
    if kernels() is None or not (device.type == "cuda" or kernels().INTERPRETED):
        return False
    try:
        ones = torch.ones(2, device=device)
        return bool(kernels().gated_silu(ones, ones).isfinite().all())
    except Exception as error:  # a compiler's own errors have no common base
        logger.debug(f"Parts of steps are not fused, since Triton does not work: {error}")
        return False


@contextmanager
def fused(model: nn.Module, cache: BlockCache) -> Iterator[None]:
    """Replace what can be replaced in a model, for this thread.

    Args:
        model: a draft or verifier, on a GPU.
        cache: its cache, which must be recording.

    """
    if not works_on(next(model.parameters()).device):
        yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            if (replacement := replacement_of(module)) is not None:
                stack.enter_context(replaced(vars(module), "forward", replacement))
        tables = {}
        for name in {type(module).__module__ for module in model.modules()}:
            names = vars(sys.modules[name])
            if ROTARY in names:
                stack.enter_context(replaced(names, ROTARY, Rotary(names[ROTARY])))
            if INTERFACE in names:  # mostly the same one
                tables[id(names[INTERFACE])] = names[INTERFACE]
        for table in tables.values():
            attention = Attention(table[ATTENTION], cache)
            stack.enter_context(replaced(table._local_mapping, ATTENTION, attention))
        stack.enter_context(replaced(vars(cache), "write", kernels().write))
        stack.enter_context(replaced(vars(cache), "mask", partial(mask, cache)))
        yield


def mask(
    cache: BlockCache,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    block: Tensor | None = None,
    window: int | None = None,
    depths: Tensor | None = None,
) -> Tensor:
    """See ``BlockCache.mask``."""
    made: Tensor = kernels().mask(
        cache.starts(device),
        cache.padded_at(device),
        queries,
        cache.unconfirmed,
        cache.end(queries),
        dtype,
        block,
        window,
        depths,
    )
    return made


@contextmanager
def replaced(names: Any, name: str, value: Any) -> Iterator[None]:
    """Give a name another value for a while."""
    missing = object()
    before = names.get(name, missing)
    names[name] = value
    try:
        yield
    finally:
        if before is missing:
            del names[name]
        else:
            names[name] = before


def replacement_of(module: nn.Module) -> "Replacement | None":
    """What replaces a module's ``forward``; ``None`` if nothing can.

    Where somebody else replaced it, as accelerate does, or compiled it, it stays.
    """
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return None
    if type(module).__name__.endswith("RMSNorm"):
        return Norm(module)
    if all(isinstance(getattr(module, part, None), nn.Linear) for part in GATED):
        return GatedMLP(module)
    return None


class Replacement(ABC):
    """A function that runs as one kernel where that gives the same results.

    Only the thread that made it is affected: others may run the same model at the same time.

    Args:
        original: what is replaced.

    Attributes:
        tolerance: how much results may differ on average, relative to their size, in units of the
            dtype's spacing at 1. Results that are rounded elsewhere differ by about 0.2.

    """

    tolerance = 0.05

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._thread = threading.get_ident()

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Run the one or the other."""
        mine = threading.get_ident() == self._thread
        if mine and self.takes(*arguments, **settings) and self._agrees(arguments, settings):
            return self.run(*arguments, **settings)
        return self.original(*arguments, **settings)

    @abstractmethod
    def takes(self, *arguments: Any, **settings: Any) -> bool:
        """Whether the arguments are such that it could be used."""

    @abstractmethod
    def run(self, *arguments: Any, **settings: Any) -> Any:
        """Compute the same with fewer kernels."""

    @abstractmethod
    def key(self, *arguments: Any) -> Hashable:
        """What decides, besides numbers, whether the results are the same."""

    def compared(self, result: Any, *arguments: Any) -> Tensor:
        """The part of a result that must be the same."""
        del arguments
        assert isinstance(result, Tensor)
        return result

    def _agrees(self, arguments: tuple[Any, ...], settings: dict[str, Any]) -> bool:
        key = (type(self), self.key(*arguments))
        if key not in AGREES:
            try:
                AGREES[key] = self._compare(arguments, settings)
            except Exception as error:  # a compiler's own errors have no common base
                AGREES[key] = False
                logger.debug(f"No {type(self).__name__} in one kernel: {error}")
        return AGREES[key]

    def _compare(self, arguments: tuple[Any, ...], settings: dict[str, Any]) -> bool:
        """Compare both on random inputs."""
        inputs = [self.random(place, one) for place, one in enumerate(arguments)]
        found, expected = (
            self.compared(function(*inputs, **settings), *inputs).float()
            for function in (self.run, self.original)
        )
        spacing = max(torch.finfo(self._dtype(arguments)).eps, 2e-5)
        difference = (found - expected).abs().mean() / expected.abs().mean()
        return bool(difference <= self.tolerance * spacing)

    def random(self, place: int, value: Any) -> Any:
        """A random value in place of an argument."""
        del place
        return torch.randn_like(value) if isinstance(value, Tensor) else value

    @staticmethod
    def _dtype(arguments: tuple[Any, ...]) -> torch.dtype:
        return next(one.dtype for one in arguments if isinstance(one, Tensor))


class Norm(Replacement):
    """Root mean square norms."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.forward)
        self.module = module
        names = ("variance_epsilon", "eps")
        self.epsilon = next(
            (getattr(module, name) for name in names if hasattr(module, name)), None
        )

    def takes(self, *arguments: Any, **settings: Any) -> bool:
        weight = getattr(self.module, "weight", None)
        return (
            len(arguments) == 1
            and not settings
            and isinstance(self.epsilon, float)
            and isinstance(weight, Tensor)
            and weight.shape == arguments[0].shape[-1:]
            and weight.dtype == arguments[0].dtype
        )

    def run(self, *arguments: Any, **settings: Any) -> Any:
        del settings
        return kernels().rms_norm(arguments[0], self.module.weight, self.epsilon)

    def key(self, *arguments: Any) -> Hashable:
        return type(self.module), arguments[0].dtype, arguments[0].shape[-1]


class GatedMLP(Replacement):
    """MLPs whose intermediate states are the product of two projections, one of them activated."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.forward)
        self.module = module

    def takes(self, *arguments: Any, **settings: Any) -> bool:
        return len(arguments) == 1 and not settings

    def run(self, *arguments: Any, **settings: Any) -> Any:
        del settings
        gate, up = self.module.gate_proj(arguments[0]), self.module.up_proj(arguments[0])
        return self.module.down_proj(kernels().gated_silu(gate, up))

    def key(self, *arguments: Any) -> Hashable:
        activation = getattr(self.module, "act_fn", None)
        return type(self.module), type(activation), arguments[0].dtype


class Rotary(Replacement):
    """The rotation of queries and keys."""

    def takes(self, *arguments: Any, **settings: Any) -> bool:
        if len(arguments) != 4 or settings:
            return False
        queries, keys, cos, _ = arguments
        same = queries.dtype == cos.dtype and queries.shape[-1] == cos.shape[-1]
        dense = queries.stride(-1) == keys.stride(-1) == 1
        return bool(queries.ndim == 4 and cos.ndim == 3 and same and dense)

    def run(self, *arguments: Any, **settings: Any) -> Any:
        del settings
        return kernels().rotate(*arguments)

    def key(self, *arguments: Any) -> Hashable:
        return self.original, arguments[0].dtype

    def compared(self, result: Any, *arguments: Any) -> Tensor:
        del arguments
        return torch.cat([rotated.flatten() for rotated in result])


class Attention(Replacement):
    """Attention to the slots of a cache that are in use, without copies of shared keys and values.

    Args:
        original: transformers' function.
        cache: that keys and values are in.

    """

    tolerance = 1.0  # the probabilities are rounded, too

    def __init__(self, original: Callable[..., Any], cache: BlockCache) -> None:
        super().__init__(original)
        self.cache = cache

    def takes(self, *arguments: Any, **settings: Any) -> bool:
        if len(arguments) != 5:
            return False
        _, queries, keys, values, mask = arguments
        return (
            isinstance(mask, Tensor)
            and mask.ndim == 4
            and mask.shape[1:] == (1, queries.shape[2], keys.shape[2])
            and mask.is_floating_point()
            and keys.shape == values.shape
            and all(one.stride(-1) == 1 for one in (queries, keys, values, mask))
            and keys.shape[2] == self.cache.end(self.cache.written)
            and not settings.get("dropout")
            and settings.get("scaling") is not None
            and settings.get("position_bias") is None
        )

    def run(self, *arguments: Any, **settings: Any) -> Any:
        _, queries, keys, values, mask = arguments
        length = self.cache.unconfirmed + self.cache.written
        starts = self.cache.starts(queries.device)
        scale = settings["scaling"]
        return kernels().attend(queries, keys, values, mask, starts, length, scale), None

    def key(self, *arguments: Any) -> Hashable:
        _, queries, keys, *_ = arguments
        return self.original, queries.dtype, queries.shape[1] // keys.shape[1], queries.shape[3]

    def random(self, place: int, value: Any) -> Any:
        return torch.randn_like(value) if 1 <= place <= 3 else value

    def _dtype(self, arguments: tuple[Any, ...]) -> torch.dtype:  # type: ignore[override]
        dtype: torch.dtype = arguments[1].dtype
        return dtype

    def compared(self, result: Any, *arguments: Any) -> Tensor:
        # What a query with nothing to attend to gets is never used.
        mask = arguments[4]
        attends = (mask == 0).any(-1)[:, 0, :, None, None]
        found: Tensor = result[0]
        return torch.where(attends, found, 0)
