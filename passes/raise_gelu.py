"""Raise a GELU written out as a formula to `gelu`.

Law: a tree of pointwise ops over one value and literals is a function of one real number;
if it agrees with GELU (tanh or erf form) on a grid of 4,001 points in fp64 to the seven digits
to which its constants are commonly written, it is GELU.
Evaluating the tree instead of matching its spelling covers every order of the factors.

    before                                          after
    %c = pow(%x, 3)
    %i = add(%x, mul(%c, 0.044715))
    %t = tanh(mul(%i, 0.79788456))
    %y = mul(mul(%x, 0.5), add(%t, 1))              %y = gelu(%x, approximate="tanh")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node, map_arg

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

_POINTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.rsub.Scalar,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.square.default,
        aten.tanh.default,
        aten.erf.default,
    }
)
_LONGEST = 16  # nodes in a written-out GELU; the usual ones have 8


@dataclass(frozen=True)
class RaiseGelu:
    """Replace written-out GELUs, found from their tanh or erf."""

    name: ClassVar[str] = "raise_gelu"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Grow forward from each tanh and erf until the tree is a GELU or cannot be one."""
        for core in match.nodes_of(draft.graph, aten.tanh.default, aten.erf.default):
            found = _find(core)
            if found is not None:
                end, operand, form = found
                draft.did(end, f"a written-out GELU became gelu(approximate={form!r})")
                draft.replace_call(end, aten.gelu.default, operand, approximate=form)


def _find(core: Node) -> tuple[Node, Node, str] | None:
    form = "tanh" if core.target is aten.tanh.default else "none"
    operands = _ancestors(core)
    end: Node | None = core
    for _ in range(_LONGEST):
        end = match.sole_reader(end) if end is not None else None
        if end is None or end.target not in _POINTWISE:
            return None
        for operand in operands:
            if _agrees(end, operand, form):
                return end, operand, form
    return None


def _ancestors(core: Node) -> list[Node]:
    """Return the values that `core` is computed from by a few pointwise ops, nearest first."""
    found: dict[Node, None] = {}
    todo = [core]
    while todo and len(found) < _LONGEST:
        node = todo.pop(0)
        for parent in node.all_input_nodes:
            if match.is_tensor(parent) and parent not in found:
                found[parent] = None
                if parent.target in _POINTWISE:
                    todo.append(parent)
    return list(found)


def _agrees(end: Node, operand: Node, form: str) -> bool:
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    actual = _evaluate(end, {operand: grid})
    expected = torch.nn.functional.gelu(grid, approximate=form)
    # Constants such as sqrt(2/pi) are often written with 7 to 10 digits.
    return actual is not None and torch.allclose(actual, expected, rtol=1e-6, atol=1e-7)


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    """Compute `node` from known values; None if it depends on anything else."""
    if node in values:
        return values[node]
    if node.target not in _POINTWISE:
        return None
    for parent in node.all_input_nodes:
        if _evaluate(parent, values) is None:
            return None
    args = map_arg(node.args, values.__getitem__)
    values[node] = match.target(node)(*args, **node.kwargs)
    return values[node]
