"""Constants as JSON: what graphs, signatures and configurations hold beside tensors.

- None, bool, int, finite float, str, list: as JSON has them
- tuple: `{"tuple": [...]}`; dict with str keys: `{"dict": {...}}`
- inf, -inf, nan: `{"float": "inf"}`
- torch.float32 and the like: `{"dtype": "float32"}`; a device: `{"device": true}`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from wancompile.errors import ArtifactError

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.complex64, torch.complex128, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


def _named(*values: Any) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in values}


_NAMED: Mapping[str, Mapping[str, Any]] = {
    "dtype": _named(*_DTYPES),
    "layout": _named(torch.strided),
    "memory_format": _named(
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    ),
}
_KINDS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}

Special = Callable[[Any], Any]


def encode(value: Any, special: Special | None = None) -> Any:
    """Return `value` as JSON data.

    A device is written without its name: a program lies on one device, which whoever loads it
    chooses. `special` may return data for values of other types, or None.

    Raises:
        ArtifactError: `value` is of a kind that artifacts do not hold.
    """
    if value is None or isinstance(value, bool) or type(value) in (int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is tuple:
        return {"tuple": [encode(one, special) for one in value]}
    if isinstance(value, list):
        return [encode(one, special) for one in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {key: encode(one, special) for key, one in value.items()}}
    if isinstance(value, torch.device):
        return {"device": True}
    for kind, label in _KINDS.items():
        if isinstance(value, kind):
            return {label: str(value).removeprefix("torch.")}
    if special is not None and (data := special(value)) is not None:
        return data
    raise ArtifactError(f"{value!r} of type {type(value).__name__} cannot be saved")


def decode(data: Any, special: Mapping[str, Special] | None = None) -> Any:
    """Return the value that `encode` wrote; devices become the CPU.

    `special` maps further labels to what makes values of their data.

    Raises:
        ArtifactError: `data` is not what `encode` writes.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(one, special) for one in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtifactError(f"{data!r} is no value of an artifact")
    ((label, content),) = data.items()
    if label == "tuple" and isinstance(content, list):
        return tuple(decode(one, special) for one in content)
    if label == "dict" and isinstance(content, dict):
        return {key: decode(one, special) for key, one in content.items()}
    if label == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if label == "device":
        return torch.device("cpu")
    if label in _NAMED and content in _NAMED[label]:
        return _NAMED[label][content]
    if special is not None and label in special:
        return special[label](content)
    raise ArtifactError(f"{data!r} is no value of an artifact")


def dtype_name(dtype: torch.dtype) -> str:
    """Return how artifacts call `dtype`."""
    name: str = encode(dtype)["dtype"]
    return name


def dtype_named(name: str) -> torch.dtype:
    """Return the type that `dtype_name` named; raise `ArtifactError` for anything else."""
    dtype: torch.dtype = decode({"dtype": name})
    return dtype
