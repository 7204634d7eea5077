"""What a kernel is: an op that computes the same as a semantic op, faster, where it fits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16

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
    """CUDA compute capability of `device`, None where it is not a CUDA device.

    torch calls AMD's devices "cuda", too, with numbers that mean something else.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def lacks_capability(device: torch.device, least: tuple[int, int]) -> str | None:
    """The reason why `device` cannot run a kernel that needs compute capability `least`."""
    have = capability(device)
    if have is None:
        return f"needs a CUDA device, not {device.type if torch.version.hip is None else 'ROCm'}"
    if have < least:
        return f"needs compute capability {least[0]}.{least[1]}, not {have[0]}.{have[1]}"
    return None


def lacks_triton() -> str | None:
    """The reason why a kernel written in Triton cannot run, whatever the device."""
    return None if importlib.util.find_spec("triton") else "the package triton is missing"


def lacks_triton_device(device: torch.device, least: tuple[int, int]) -> str | None:
    """The reason why a Triton kernel that needs compute capability `least` cannot run there."""
    return lacks_capability(device, least) or lacks_triton()


def lacks_hopper(device: torch.device) -> str | None:
    """The reason why `device` cannot run a kernel that is made for the H100 and its relatives."""
    have = capability(device)
    if have is not None and have[0] > 9:
        return f"is made for compute capability 9.0, not {have[0]}.{have[1]}"
    return lacks_triton_device(device, (9, 0))


def lacks_gluon() -> str | None:
    """The reason why a kernel written in Gluon, the lower layer of Triton, cannot run."""
    lacking = lacks_triton()
    if lacking is None and importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this triton has no gluon"
    return lacking


def lacks_float(name: str, dtype: torch.dtype) -> str | None:
    """The reason why a kernel that computes in fp32 does not take or give floats of `dtype`."""
    return None if dtype in _FLOATS else f"{name} is {dtype}, not a float of 16 or 32 bits"


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless it is contiguous and starts where bulk copies may: at 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if starts_aligned(tensor) else tensor.clone()


def starts_aligned(tensor: Tensor) -> bool:
    """Whether `tensor` starts where bulk copies may: at 16 bytes."""
    return tensor.data_ptr() % _ALIGNMENT == 0


def lacks_dtype(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """The reason why a kernel for `dtype` does not take `tensor`."""
    return None if tensor.dtype == dtype else f"takes {dtype}, not {tensor.dtype}"


def lacks_multiple(name: str, size: int, divisor: int) -> str | None:
    """The reason why a kernel does not take a dim of this size."""
    if not isinstance(size, int):
        return f"{name} is not static"
    return None if size % divisor == 0 else f"{name}={size} is not a multiple of {divisor}"
