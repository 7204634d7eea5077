"""Stored tensors as shards of safetensors: written in one pass, checked, and mapped into memory.

A shard is written tensor by tensor, so that saving needs memory for one tensor more, not for a copy
of them all. Complex numbers, which safetensors lacks, are stored as pairs along one more dimension.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wancompile.artifact import values
from wancompile.errors import ArtifactError

SHARD_BYTES = 1 << 30
"""How large a shard may become; one tensor is never split. Shards are checked side by side."""

FILE = re.compile(r"weights-\d{5}-of-\d{5}\.safetensors")
# torch.fx writes the names of stored tensors into Python text: none may end its quotes.
_NAME = re.compile(r"[\w:#-]+(\.[\w:#-]+)*", re.ASCII)
_ALIGNMENT = 64
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Stored:
    """The dtype and the shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One file: its size in bytes, its SHA-256, and the tensors in it."""

    file: str
    nbytes: int
    sha256: str
    tensors: Mapping[str, Stored]


def write(
    folder: Path, state: Mapping[str, torch.Tensor], *, limit: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Write `state` into `folder` in shards of at most `limit` bytes, and force it to disk.

    Raises:
        ArtifactError: a tensor has no values, or a name or dtype that cannot be stored.
        OSError: the disk is full, or cannot be written to.
    """
    for name, tensor in state.items():
        _check(name, tensor)
    parts = shards(state, limit)
    return tuple(
        _write_shard(folder / f"weights-{number:05}-of-{len(parts):05}.safetensors", part)
        for number, part in enumerate(parts, start=1)
    )


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ArtifactError(f"{name} is on the meta device: there are no values to save")
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"a tensor of the name {name!r} cannot be saved")
    if _real(tensor).dtype not in _CODES:
        raise ArtifactError(f"{name} of type {tensor.dtype} cannot be saved")


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def shards(state: Mapping[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """Cut `state` into parts of at most `limit` bytes, or of one tensor that is larger."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in state.items():
        if parts[-1] and filled + tensor.nbytes > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    return parts


def _write_shard(path: Path, part: Mapping[str, torch.Tensor]) -> Shard:
    # The largest items first: then every tensor begins where its type may.
    names = sorted(part, key=lambda name: -_real(part[name]).itemsize)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for data in chain([_header(names, part)], (_bytes(part[name]) for name in names)):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    tensors = {n: Stored(values.dtype_name(t.dtype), tuple(t.shape)) for n, t in part.items()}
    return Shard(path.name, size, digest.hexdigest(), tensors)


def _header(names: Iterable[str], part: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        real = _real(part[name])
        begin, end = end, end + real.nbytes
        entries[name] = {
            "dtype": _CODES[real.dtype],
            "shape": list(real.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> Any:
    """Return the bytes of `tensor`, without a copy where it lies on the CPU in one piece."""
    flat = _real(tensor.detach()).cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read(
    folder: Path, shards: Iterable[Shard], device: torch.device, *, verify: bool
) -> dict[str, torch.Tensor]:
    """Return the stored tensors on `device`; on a CPU they are the mapped files themselves.

    With `verify` the SHA-256 of every shard is compared: one read of the file, which also brings it
    into memory for what follows.

    Raises:
        ArtifactError: a shard is missing, cut off, changed, or holds other tensors.
    """
    shards = tuple(shards)
    for shard in shards:
        _check_file(folder, shard)

    def one(shard: Shard) -> dict[str, torch.Tensor]:
        if verify:
            _check_digest(folder / shard.file, shard)
        return _read_shard(folder / shard.file, shard, device)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return {name: tensor for part in pool.map(one, shards) for name, tensor in part.items()}


def _check_file(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if not FILE.fullmatch(shard.file):
        raise ArtifactError(f"{shard.file!r} is no name of a shard")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    size = path.stat().st_size
    if size != shard.nbytes:
        raise ArtifactError(f"{path} has {size} bytes where {shard.nbytes} were written")
    for name in shard.tensors:
        if not _NAME.fullmatch(name):
            raise ArtifactError(f"{name!r} is no name of a stored tensor")


def _check_digest(path: Path, shard: Shard) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise ArtifactError(f"{path} is damaged, or of another model: its SHA-256 is not the saved")


def _read_shard(path: Path, shard: Shard, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}") from error
    if found.keys() != shard.tensors.keys():
        odd = min(found.keys() ^ shard.tensors.keys())
        raise ArtifactError(f"{path} is of another model: only one of the two holds {odd}")
    return {name: _restore(path, name, found[name], s, device) for name, s in shard.tensors.items()}


def _restore(
    path: Path, name: str, tensor: torch.Tensor, stored: Stored, device: torch.device
) -> torch.Tensor:
    if values.dtype_named(stored.dtype).is_complex:
        tensor = torch.view_as_complex(tensor)
    actual = Stored(values.dtype_name(tensor.dtype), tuple(tensor.shape))
    if actual != stored:
        raise ArtifactError(f"{path} is of another model: {name} is {actual}, not {stored}")
    return tensor.to(device)
