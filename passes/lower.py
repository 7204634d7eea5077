"""Pick an implementation for every semantic op, by device and shape.

Law: a kernel computes what its semantic op means, up to rounding; where none supports the device
and the shapes, the op's own plain body runs. This is the only pass that looks at the device.

    before                                          after (H100)
    %y = scaled_linear(%q, %s, W8, ...)             %y = linear_triton(%q, %s, W8, ...)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node, map_arg

from wancompile import kernels
from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import QUANTIZED_OPS, Level


@dataclass(frozen=True)
class Lower:
    """Replace semantic ops by the first kernel that supports them on `device`."""

    device: torch.device

    name: ClassVar[str] = "lower"
    needs: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.LOWERED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Choose for each op on its own; report how often each implementation was taken."""
        taken: Counter[tuple[str, str]] = Counter()
        refused: Counter[tuple[str, str, str]] = Counter()
        for node in [n for n in draft.graph.nodes if n.target in QUANTIZED_OPS]:
            semantic = match.target_name(node)
            args = map_arg(node.args, _value)
            kernel, reasons = kernels.choose(node.target, self.device, args)
            for name, reason in reasons:
                refused[semantic, name, reason] += 1
            taken[semantic, kernel.name if kernel else "plain body"] += 1
            if kernel is not None:
                draft.replace_call(node, kernel.impl, *node.args, **node.kwargs)
        for (semantic, name), count in taken.items():
            draft.did(semantic, f"{count} x {name}")
        for (semantic, name, reason), count in refused.items():
            draft.skip(semantic, f"{count} x not {name}: {reason}")


def _value(node: Node) -> Any:
    return node.meta["val"]
