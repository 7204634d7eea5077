"""Write a two-operand einsum as one batched matmul between permutes.

Law: for subscripts without repeats inside an operand, `einsum("...,...->...", a, b)` is
`matmul(permute(a), permute(b))` with the shared kept letters as batch, the shared dropped letters
as the contracted dimension and the rest as rows and columns, permuted to the output's order. The
operand whose letter comes first in the output gives the rows; an ellipsis stands for the same
leading letters in every term.

    before                                          after
    %s = einsum("bqhd,bkhd->bhqk", [%q, %k])        %a = permute(%q, [0, 2, 1, 3])
                                                    %b = permute(%k, [0, 2, 3, 1])
                                                    %s = matmul(%a, %b)
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten


@dataclass(frozen=True)
class _Letters:
    """The letters of an einsum by what happens to them; one row, one column, one inner letter.

    `left` are those of the operand that gives the rows, the second one where `swapped`.
    """

    left: str
    right: str
    output: str
    swapped: bool
    batch: str
    row: str
    column: str
    inner: str


@dataclass(frozen=True)
class RaiseEinsum:
    """Replace einsums that are one batched matmul."""

    name: ClassVar[str] = "raise_einsum"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every einsum once."""
        for node in match.nodes_of(draft.graph, aten.einsum.default):
            letters = _letters(node)
            if letters is None:
                draft.skip(node, f"einsum {match.args(node)[0]!r} is not one batched matmul", node)
                continue
            _rewrite(draft, node, letters)


def _letters(node: Node) -> _Letters | None:
    operands: Any = match.args(node)[1]
    terms = _terms(str(match.args(node)[0]), operands)
    if terms is None:
        return None
    left, right, output = terms
    if any(len(set(term)) != len(term) for term in (left, right, output)):
        return None
    batch = "".join(c for c in output if c in left and c in right)
    row = "".join(c for c in left if c in output and c not in right)
    column = "".join(c for c in right if c in output and c not in left)
    inner = "".join(c for c in left if c in right and c not in output)
    used = set(batch + row + column + inner)
    if len(row) != 1 or len(column) != 1 or len(inner) != 1 or used != set(left + right + output):
        return None
    if output.index(column) < output.index(row):
        return _Letters(right, left, output, True, batch, column, row, inner)
    return _Letters(left, right, output, False, batch, row, column, inner)


def _terms(equation: str, operands: Sequence[Node]) -> tuple[str, str, str] | None:
    """Return the letters of two operands and of the output, ellipses written as letters."""
    if "->" not in equation or len(operands) != 2:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if "." not in equation:
        return left, right, output
    if not all(term.startswith("...") for term in (left, right, output)):
        return None
    hidden = {
        match.rank(operand) - (len(term) - 3)
        for operand, term in zip(operands, (left, right), strict=True)
    }
    if len(hidden) != 1:
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    leading = "".join(free[: hidden.pop()])
    return leading + left[3:], leading + right[3:], leading + output[3:]


def _rewrite(draft: Draft, node: Node, letters: _Letters) -> None:
    a, b = match.args(node)[1][:: -1 if letters.swapped else 1]
    a = _permuted(draft, node, a, letters.left, letters.batch + letters.row + letters.inner)
    b = _permuted(draft, node, b, letters.right, letters.batch + letters.inner + letters.column)
    product = draft.call(aten.matmul.default, a, b, before=node, like=node)
    order = letters.batch + letters.row + letters.column
    draft.did(node, f"einsum {match.args(node)[0]!r} became a matmul")
    draft.replace(node, _permuted(draft, node, product, order, letters.output))


def _permuted(draft: Draft, node: Node, operand: Any, have: str, want: str) -> Node:
    if have == want:
        result: Node = operand
        return result
    order = [have.index(letter) for letter in want]
    return draft.call(aten.permute.default, operand, order, before=node, like=node)
