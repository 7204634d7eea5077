"""Pick an implementation for every op that has kernels, by device and shape.

Law: a kernel computes what its op means, up to rounding; where none supports the device and the
shapes, the op itself runs. This is the only pass that looks at the device.

    before                                          after (H100)
    %y = scaled_linear(%q, %s, W8, ...)             %y = linear_hopper(%q, %s, W8, ...)

Where no kernel takes a linear with its residual, branch of low rank or GELU, but some kernel takes
the linear, they are ops of their own: the plain body of a product is no way to multiply on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node, map_arg

from wancompile import kernels
from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import FUSED_OPS, Level
from wancompile.kernels import Kernel
from wancompile.passes import fuse_linear_gelu

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class Lower:
    """Replace ops by the first kernel that supports them on `device`."""

    device: torch.device

    name: ClassVar[str] = "lower"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.LOWERED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Choose for each op on its own; report how often each implementation was taken."""
        for node in match.nodes_of(draft.graph, ops.scaled_linear_residual.default):
            self._split_residual(draft, node)
        for node in match.nodes_of(draft.graph, ops.scaled_linear_low_rank.default):
            self._split_low_rank(draft, node)
        for node in match.nodes_of(draft.graph, ops.linear_gelu_quantize.default):
            self._split_gelu(draft, node)
        taken: Counter[tuple[str, str]] = Counter()
        refused: Counter[tuple[str, str]] = Counter()
        implemented = {kernel.op for kernel in kernels.KERNELS} | FUSED_OPS
        for node in [n for n in draft.graph.nodes if n.target in implemented]:
            semantic = match.target_name(node)
            args = _positional(node)
            kernel, reasons = self._choose(node.target, args)
            refused.update((semantic, text) for text in _objections(kernel, reasons))
            taken[semantic, kernel.name if kernel else _own_body(node)] += 1
            if kernel is not None:
                draft.replace_call(node, kernel.impl, *args)
        for (semantic, name), count in taken.items():
            draft.did(semantic, f"{count} x {name}")
        for (semantic, text), count in refused.items():
            draft.skip(semantic, f"{count} x {text}")

    def _split_residual(self, draft: Draft, node: Node) -> None:
        *linear, residual, gate = _positional(node)
        linear.append(match.val(residual).dtype)
        whole, _ = self._choose(node.target, _positional(node))
        part, _ = self._choose(ops.scaled_linear.default, linear)
        if whole is not None or part is None:
            return
        y = draft.call(ops.scaled_linear.default, *linear, before=node, like=node)
        draft.replace_call(node, ops.add_gated.default, residual, y, gate, None, None)

    def _split_low_rank(self, draft: Draft, node: Node) -> None:
        *linear, low, up, out_dtype = _positional(node)
        linear.append(out_dtype)
        whole, _ = self._choose(node.target, _positional(node))
        part, _ = self._choose(ops.scaled_linear.default, linear)
        if whole is not None or part is None or match.val(low).dtype != out_dtype:
            return
        y = draft.call(ops.scaled_linear.default, *linear, before=node, like=node)
        branch = draft.call(aten.linear.default, low, up, before=node, like=node)
        draft.replace_call(node, aten.add.Tensor, y, branch)

    def _split_gelu(self, draft: Draft, node: Node) -> None:
        linear = *_positional(node)[:5], fuse_linear_gelu.between(node)
        whole, _ = self._choose(node.target, _positional(node))
        part, _ = self._choose(ops.scaled_linear.default, linear)
        if whole is None and part is not None:
            fuse_linear_gelu.split(draft, node, ops.scaled_linear.default, *linear)

    def _choose(self, op: Any, args: Sequence[Any]) -> tuple[Kernel | None, list[tuple[str, str]]]:
        return kernels.choose(op, self.device, map_arg(tuple(args), _value))


def _objections(kernel: Kernel | None, reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Return why kernels refused, in one line where all of them have the same reason."""
    known = {reason for _, reason in reasons}
    if kernel is None and len(known) == 1:
        return [f"no kernel: each {known.pop()}"]
    return [f"not {name}: {reason}" for name, reason in reasons]


def _own_body(node: Node) -> str:
    return "plain body" if node.target in FUSED_OPS else "torch's own"


def _positional(node: Node) -> tuple[Any, ...]:
    """Return all arguments of a call in the order of its op, defaults included."""
    parameters = match.target(node)._schema.arguments
    given = [match.arg(node, i, one.name, one.default_value) for i, one in enumerate(parameters)]
    return tuple(given)


def _value(node: Node) -> Any:
    return node.meta["val"]
