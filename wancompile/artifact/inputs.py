"""The signature of a program as JSON, and the fake tensors that its graph takes.

A dimension that may change from call to call is written by name. Dimensions of one name are equal
in every call; `example`, `least` and `most` are what the export knew of each. The example is one
of the sizes it was traced with, so that whatever torch decides by it is decided the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from wancompile.artifact import facts, values
from wancompile.errors import ArtifactError
from wancompile.ir import match
from wancompile.signature import InputSpec, Signature


@dataclass(frozen=True)
class OpenSize:
    """A dimension that may change: one size it had, and the range it was proved for.

    `most` is None where there is no bound.
    """

    example: int
    least: int
    most: int | None


@dataclass(frozen=True)
class Input:
    """A tensor input: its name, its dtype, and its shape with open dimensions by name."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """All tensor inputs in the order of the placeholders, and the open sizes among their dims."""

    tensors: tuple[Input, ...]
    sizes: Mapping[str, OpenSize]


def of_graph(signature: Signature, fakes: Sequence[torch.Tensor]) -> Inputs:
    """Describe the inputs of a graph, whose placeholders yield `fakes`."""
    names: dict[Any, str] = {}
    sizes: dict[str, OpenSize] = {}
    tensors = []
    for spec, fake in zip(signature.inputs, fakes, strict=True):
        dims: tuple[Any, ...] = tuple(fake.shape)
        shape = []
        for size in dims:
            if not match.is_symbolic(size):
                shape.append(str(int(size)))
                continue
            name = names.setdefault(size.node.expr, f"d{len(names)}")
            sizes[name] = _open_size(size)
            shape.append(name)
        tensors.append(Input(spec.name, values.dtype_name(fake.dtype), tuple(shape)))
    return Inputs(tuple(tensors), sizes)


def _open_size(size: Any) -> OpenSize:
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    most = int(bounds.upper) if bounds.upper.is_Integer else None
    return OpenSize(int(size.node.hint), int(bounds.lower), most)


def fakes(inputs: Inputs) -> tuple[FakeTensorMode, list[torch.Tensor]]:
    """Return fake tensors for all inputs, open dimensions symbolic, and the mode they live in."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    with mode:
        sizes = {name: _symbolic(env, name, size) for name, size in inputs.sizes.items()}
        return mode, [_fake(one, sizes) for one in inputs.tensors]


def _symbolic(env: ShapeEnv, name: str, size: OpenSize) -> Any:
    from torch._dynamo.source import ConstantSource  # late: it imports triton

    source = ConstantSource(name)
    symbol = env.create_symbol(size.example, source, dynamic_dim=DimDynamic.DYNAMIC)
    open_size = env.create_symintnode(symbol, hint=size.example, source=source)
    # Asking narrows the range of the symbol.
    if not (open_size >= size.least and (size.most is None or open_size <= size.most)):
        raise ArtifactError(f"the size {name} has the example {size.example}, beyond its range")
    return open_size


def _fake(one: Input, sizes: Mapping[str, Any]) -> torch.Tensor:
    shape = [sizes[size] if size in sizes else int(size) for size in one.shape]
    return torch.empty(shape, dtype=values.dtype_named(one.dtype), device="cpu")


def signature_data(signature: Signature) -> dict[str, Any]:
    """Return all of `signature` but its inputs as JSON data."""
    return {
        "parameters": list(signature.parameters),
        "defaults": values.encode(dict(signature.defaults)),
        "constants": values.encode(dict(signature.constants)),
        "output": _structure(signature.output),
    }


def signature_from(data: Mapping[str, Any], inputs: Inputs) -> Signature:
    """Return the signature that `signature_data` and `of_graph` described."""
    defaults, constants = values.decode(data["defaults"]), values.decode(data["constants"])
    if not isinstance(defaults, dict) or not isinstance(constants, dict):
        raise ArtifactError("the signature names no defaults and constants")
    return Signature(
        parameters=facts.from_data(tuple[str, ...], data["parameters"]),
        defaults=defaults,
        inputs=tuple(_spec(one, inputs.sizes) for one in inputs.tensors),
        constants=constants,
        output=pytree.tree_structure(values.decode(data["output"])),
    )


def _spec(one: Input, sizes: Mapping[str, OpenSize]) -> InputSpec:
    shape = tuple(None if size in sizes else int(size) for size in one.shape)
    return InputSpec(one.name, shape, values.dtype_named(one.dtype))


def _structure(spec: pytree.TreeSpec) -> Any:
    """Return the structure of an output as an example of it: tuples, lists and dicts of numbers.

    torch can write a structure as JSON, too, but to read that it imports modules it finds named.
    """
    data = values.encode(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    if pytree.tree_structure(values.decode(data)) != spec:
        raise ArtifactError(
            f"the model returns {spec}; only tuples, lists and dicts of tensors can be saved"
        )
    return data
