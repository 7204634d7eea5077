"""Digests of weights and of calls: whether two runs are about the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from wancompile.signature import flatten

# Elements looked at in each tensor of a model: enough to tell checkpoints, experts and merged LoRAs
# apart, and no time lost on models of many GB.
_LOOKED_AT = 256


def of_state(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names, shapes, types and some elements of each tensor, in hex."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
        found.update(_bytes(flat[:: max(1, flat.numel() // _LOOKED_AT)]))
    return found.hexdigest()


def of_call(call: Mapping[str, Any], label: str, *, values: bool) -> str:
    """Return a digest of the arguments of a call and its kind, in hex.

    Without `values` only what has one entry per video or token is looked into, the timestep that
    is, and of other tensors their names, shapes and types.
    """
    found = hashlib.blake2b(label.encode(), digest_size=16)
    for name, leaf in flatten(call).items():
        if not isinstance(leaf, torch.Tensor):
            found.update(f"{name} {leaf!r} ".encode())
            continue
        found.update(f"{name} {tuple(leaf.shape)} {leaf.dtype} ".encode())
        if values or leaf.dim() <= 2:
            found.update(_bytes(leaf))
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous()
    # One number may have any stride, 0 where it was expanded, and then cannot be viewed as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
