"""From how dynamo spells a tensor or a module to how the model calls it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

# Where a module keeps what its attributes name; dynamo spells them out.
_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})
_PART = re.compile(r"[^\[\]'\".()]+")


@dataclass(frozen=True)
class Names:
    """Turns dynamo's `L['self']._modules['blocks'].0` into the model's `blocks.0`.

    `roots` spell the outermost modules. What belongs to the only one is named from there; several
    keep the last part of their spelling, so that their names differ.
    """

    roots: tuple[tuple[str, ...], ...]

    @classmethod
    def of_modules_in(cls, spellings: Iterable[str]) -> Names:
        """Take as roots whatever owns a parameter, a buffer or a module and is owned by none."""
        found = dict.fromkeys(root for one in spellings if (root := _root(one)))
        return cls(tuple(sorted(found, key=len, reverse=True)))

    def name(self, spelling: str) -> str:
        """Return the qualified name of a tensor or a module."""
        parts = tuple(part for part in parts_of(spelling) if part not in _REGISTRIES)
        for root in self.roots:
            if parts[: len(root)] == root:
                kept = len(root) if len(self.roots) == 1 else len(root) - 1
                return ".".join(parts[kept:])
        return ".".join(parts)


def parts_of(spelling: str) -> tuple[str, ...]:
    """Return the words of dynamo's spelling, outermost first."""
    return tuple(part for part in _PART.findall(spelling) if part != "__dict__")


def _root(spelling: str) -> tuple[str, ...]:
    parts = parts_of(spelling)
    return next((parts[:i] for i, part in enumerate(parts) if part in _REGISTRIES), ())


@dataclass(frozen=True)
class Origin:
    """Where dynamo found the value of a placeholder.

    `spelling` is how dynamo writes it. `is_stored` says that it is a tensor of the model,
    `is_given` that it comes with the call; attributes of the model and the likes of `math.pi` are
    neither.
    """

    spelling: str
    is_stored: bool
    is_given: bool

    @classmethod
    def of(cls, node: Node) -> Origin:
        """Read what dynamo noted at a placeholder."""
        found = node.meta["grapharg"]
        # Properties of a source in newer versions of torch, methods in older ones.
        spelling, owner = (_called(getattr(found.source, x)) for x in ("name", "guard_source"))
        # Dynamo passes floats as tensors that it makes anew for each call.
        is_own = isinstance(node.meta["example_value"], torch.Tensor) and found.is_tensor
        is_of_model = "NN_MODULE" in owner.name
        is_given = not is_of_model and "GLOBAL" not in owner.name
        return cls(spelling, is_own and is_of_model, is_given)


def _called(value: Any) -> Any:
    return value() if callable(value) else value
