"""How a caller's arguments become the flat tensors that a graph takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from wancompile.errors import InputError


@dataclass(frozen=True)
class InputSpec:
    """One tensor input: its name, its shape (None for a dimension that may change), its dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def check(self, tensor: torch.Tensor) -> None:
        """Raise `InputError` if `tensor` differs in rank, in a fixed dimension or in type."""
        expected = "x".join("*" if size is None else str(size) for size in self.shape)
        if tensor.dim() != len(self.shape) or any(
            size is not None and size != actual
            for size, actual in zip(self.shape, tensor.shape, strict=False)
        ):
            actual_text = "x".join(map(str, tensor.shape))
            raise InputError(f"{self.name} has shape {actual_text}, the program takes {expected}")
        if tensor.dtype != self.dtype and not self._any_number:
            raise InputError(f"{self.name} is {tensor.dtype}, the program takes {self.dtype}")

    def narrowed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return fp64 numbers in fp32 unless the graph was made for fp64, which spreads."""
        is_wide = tensor.dtype == torch.float64 != self.dtype
        return tensor.float() if is_wide else tensor

    @property
    def _any_number(self) -> bool:
        # Schedulers hand out timesteps in int64, fp32 or fp64; all mean the same number.
        return len(self.shape) <= 2


@dataclass(frozen=True)
class Signature:
    """The parameters of a traced forward, split into tensors and constants.

    `parameters` are the names of forward's parameters in order, `inputs` the tensors in the order
    of the graph's placeholders, `constants` every other leaf with the value it was traced with,
    `output` the structure of what forward returns.
    """

    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    inputs: tuple[InputSpec, ...]
    constants: Mapping[str, Any]
    output: pytree.TreeSpec

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return the graph's outputs in the structure that forward returned."""
        return pytree.tree_unflatten(list(leaves), self.output)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the input tensors in placeholder order, or raise `InputError`."""
        leaves = flatten(name_arguments(self.parameters, self.defaults, args, kwargs))
        tensors = []
        for spec in self.inputs:
            value = leaves.pop(spec.name, None)
            if not isinstance(value, torch.Tensor):
                raise InputError(f"{spec.name} is missing: the program was traced with this tensor")
            spec.check(value)
            tensors.append(spec.narrowed(value))
        for name, value in leaves.items():
            self._check_constant(name, value)
        return tensors

    @cached_property
    def inspected(self) -> inspect.Signature:
        """What `inspect.signature` says of the traced forward, without annotations."""
        return inspect.Signature([
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=self.defaults.get(name, inspect.Parameter.empty),
            )
            for name in self.parameters
        ])  # fmt: skip

    def timestep(self, call: Mapping[str, Any]) -> float | None:
        """Return the largest timestep of a call's named arguments, None where there is none.

        It is the one input with an entry per video, or per token of it; with several such inputs
        nothing says which.
        """
        pairs = zip(self.bind((), call), self.inputs, strict=True)
        small = [one for one, spec in pairs if 1 <= len(spec.shape) <= 2 and spec.shape[0] is None]
        step = float(small[0].float().amax()) if len(small) == 1 else math.nan
        return step if math.isfinite(step) else None

    def _check_constant(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            raise InputError(f"the program was traced without the tensor {name}")
        if value is None or name == "return_dict":
            return
        if name not in self.constants:
            raise InputError(f"the program was traced without {name}, which is {value!r}")
        if value != self.constants[name]:
            raise InputError(
                f"{name} is {value!r}, but the program was traced with {self.constants[name]!r}"
            )


def parameters_of(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of the parameters of `forward`, and the defaults of those that have one."""
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        raise InputError("a forward with *args cannot be traced: name its parameters")
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.default is not inspect.Parameter.empty}
    return tuple(p.name for p in named), defaults


def name_arguments(
    parameters: Sequence[str],
    defaults: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments by name, in the order of `parameters`, defaults filled in."""
    if len(args) > len(parameters):
        raise InputError(f"{len(args)} positional arguments given, forward takes {len(parameters)}")
    given = dict(zip(parameters, args, strict=False))
    unknown = [name for name in kwargs if name not in parameters]
    if unknown:
        raise InputError(f"forward has no parameter {unknown[0]!r}; it has {', '.join(parameters)}")
    twice = [name for name in kwargs if name in given]
    if twice:
        raise InputError(f"{twice[0]} is given both by position and by name")
    merged = {**defaults, **given, **kwargs}
    return {name: merged[name] for name in parameters if name in merged}


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of named arguments, nested containers spelled out in the names."""
    leaves: dict[str, Any] = {}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            leaves[name + pytree.keystr(path)] = leaf
    return leaves
