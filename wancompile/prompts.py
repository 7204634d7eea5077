"""What was computed of the last few prompts, found by the identity of their tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef

log = logging.getLogger("wancompile")


@dataclass(frozen=True, eq=False)
class _Key:
    """One tensor as it was: itself, its version, and where and what its numbers are.

    Numbers are never compared: that would make the host wait for the device.
    """

    tensor: TensorWeakRef
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Key:
        return cls(TensorWeakRef(tensor), _facts(tensor))

    @property
    def is_fresh(self) -> bool:
        """Whether the tensor exists and has not been written to."""
        tensor = self.tensor()
        return tensor is not None and _facts(tensor) == self.facts

    def is_of(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    # The version counts writes through torch; the rest tells when `data` was exchanged.
    place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return (tensor._version, *place)


@dataclass(frozen=True, eq=False)
class _Entry:
    keys: tuple[_Key, ...]
    values: tuple[Tensor, ...]

    @property
    def is_fresh(self) -> bool:
        return all(key.is_fresh for key in self.keys)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        return all(key.is_of(one) for key, one in zip(self.keys, tensors, strict=True))


class PromptCache:
    """Keeps tensors for the last `size` lists of input tensors.

    Inputs are recognised only if they are the very same objects and nothing was written to them
    since; entries go when their inputs do, at the next call. Tensors made in inference mode do not
    count writes, so nothing is kept for them, and the log says so once.

    Attributes:
        size: for how many.
        hits, misses: how often something was found, and was not.
    """

    def __init__(self, size: int) -> None:
        self.hits = self.misses = 0
        self.size = size
        self._entries: list[_Entry] = []
        self._warned = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(value.nbytes for entry in self._entries for value in entry.values)

    def find(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Return what was kept for `inputs`, or None."""
        self._entries = [entry for entry in self._entries if entry.is_fresh]
        for entry in self._entries:
            if entry.is_of(inputs):
                self.hits += 1
                self._entries.remove(entry)
                self._entries.append(entry)
                return entry.values
        self.misses += 1
        # Room is made before new values are computed, not after.
        self._entries = self._entries[max(0, len(self._entries) - self.size + 1) :]
        return None

    def keep(self, inputs: Sequence[Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
        """Keep what was computed of `inputs`, and return it in memory of its own.

        One after the other: `values` gives up what is copied, so that memory holds both of one.
        """
        for index, value in enumerate(values):
            values[index] = _compact(value)
        kept = tuple(values)
        if any(tensor.is_inference() for tensor in inputs):
            self._warn()
        else:
            self._entries.append(_Entry(tuple(map(_Key.of, inputs)), kept))
        return kept

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the prompt was made in inference mode, in which changes to it cannot be seen: "
                "what depends on it is computed in each call; use torch.no_grad() instead"
            )


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor that holds on to no more memory than it fills."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
