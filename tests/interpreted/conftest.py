"""The Triton kernels on a CPU; tests/test_triton_kernels.py runs this folder in its own process.

Triton decides when it is imported whether kernels are interpreted, so another process is needed.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def casts_round_to_nearest(monkeypatch):
    """A GPU rounds casts to bf16 and e4m3 half to even; the interpreter cuts digits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def cast(data, source, to, rounding_mode):
        bits = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8))
        out = bits.view(dtypes[source]).to(dtypes[to]).view(torch.uint8).numpy()
        return out.view(getattr(np, f"uint{to.primitive_bitwidth}")).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", cast)
