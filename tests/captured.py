"""Models under torch.compile with the backend: what ran in them, and what was refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from wancompile.errors import WancompileError
from wancompile.pipeline import relative_error

Counts = Mapping[str, int]


def compiled(model: nn.Module, *, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    """Compile `model`; `dynamic` for every size, which takes dynamo five times as long."""
    return torch.compile(
        model, backend="wancompile", fullgraph=True, dynamic=dynamic, options=options or None
    )


def run(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.sample


def error(model: Callable[..., Any], original: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    return relative_error(run(model, inputs), run(original, inputs))


def ran(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Counts:
    """Return how often each of the compiler's ops runs in one call, as torch's profiler sees it.

    Beside them, as "linear", the linears in floating point.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.inference_mode():
        model(**inputs)
        with torch.profiler.profile(activities=[cpu]) as profile:
            model(**inputs)
    return {
        one.key.partition("::")[2]: one.count
        for one in profile.key_averages()
        if one.key.startswith("wancompile::") or one.key == "aten::linear"
    }


def linears(model: nn.Module) -> int:
    """Return how many linears a model has."""
    return sum(isinstance(one, nn.Linear) for one in model.modules())


def quantizations(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.msg.startswith("compiled a graph") for record in caplog.records)


def refused(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> WancompileError:
    """Return the backend's own error out of the one that dynamo wraps around it."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(model, inputs)
    found = caught.value.inner_exception
    assert isinstance(found, WancompileError)
    assert str(found) in str(caught.value)
    return found


class Attending(nn.Module):
    """Self-attention between a norm and a sum: the smallest model there is something to do for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(-1, (2, 8)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.sin(x + self.out(mixed.transpose(1, 2).flatten(2))) * 2


def attending() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the smallest model and a call of it."""
    return Attending().requires_grad_(False), {"x": torch.randn(2, 5, 16)}
