"""Numbers that are none are found, whatever their dtype and their bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speculators.checkpoint.files.safetensors_file import read_safetensors_file
from speculators.errors import CheckpointError
from speculators.mtp.numbers import finite

CHUNK = 1 << 12

BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float8_e5m2: torch.int8,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e8m0fnu: torch.int8,
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_every_number_of_a_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.iinfo(BITS[dtype])
    every = torch.arange(info.min, info.max + 1).to(BITS[dtype]).view(dtype)
    real = every.float().isfinite()
    file = tmp_path / "all.safetensors"

    def check(numbers: torch.Tensor) -> None:
        save_file({"numbers": numbers}, file)
        look = finite(read_safetensors_file(file)["numbers"])
        assert look is not None
        data = bytes(numbers.view(torch.uint8).numpy())
        for start in range(0, len(data), CHUNK):
            look(memoryview(data[start : start + CHUNK]))

    check(every[real])
    wrong = (~real).nonzero().flatten()
    assert len(wrong) > 0
    for place in {*wrong[:: max(1, len(wrong) // 8)].tolist(), int(wrong[-1])}:
        one = torch.cat((every[real], every[place : place + 1]))
        with pytest.raises(CheckpointError, match=rf"the first at \[{len(one) - 1}\]"):
            check(one)
