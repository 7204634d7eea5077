"""What a kernel is: an op that computes the same as a semantic op, faster, where it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

Supports = Callable[[torch.device, tuple[object, ...]], str | None]


@dataclass(frozen=True)
class Kernel:
    """One implementation that may take the place of a semantic op in a lowered graph.

    Invariants:
        `impl` takes the arguments of `op` in the same order and returns what `op` returns.
        `supports(device, args)` is None where the kernel fits, else the reason in words. `args` are
        those of the graph node: fake tensors and Python values. Leading dims may be symbolic, so it
        decides on static facts only: dtypes, K, N, head size, the capability of the device.
    """

    name: str
    op: OpOverload
    impl: OpOverload
    supports: Supports


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of `device`, None where it is not a CUDA device."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device)


def lacks_capability(device: torch.device, least: tuple[int, int]) -> str | None:
    """The reason why `device` cannot run a kernel that needs compute capability `least`."""
    have = capability(device)
    if have is None:
        return f"needs a CUDA device, not {device.type}"
    if have < least:
        return f"needs compute capability {least[0]}.{least[1]}, not {have[0]}.{have[1]}"
    return None


def lacks_dtype(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """The reason why a kernel for `dtype` does not take `tensor`."""
    return None if tensor.dtype == dtype else f"takes {dtype}, not {tensor.dtype}"


def lacks_multiple(name: str, size: int, divisor: int) -> str | None:
    """The reason why a kernel does not take a dim of this size."""
    if not isinstance(size, int):
        return f"{name} is not static"
    return None if size % divisor == 0 else f"{name}={size} is not a multiple of {divisor}"
