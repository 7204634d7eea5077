"""Give linears a branch of low rank beside their weight, for LoRAs that come and go.

Law: `x (W + B A)^T = x W^T + (x A^T) B^T` (Hu et al. 2021, "LoRA"). With A and B zero, as they are
stored here, nothing is added, and whoever writes other numbers into them changes what is.

    before                                          after
                                                    %t = low_rank_down(%x, %s, down)
    %y = scaled_linear(%x, %s, W8, Ws, b, bf16)     %y = scaled_linear_low_rank(%x, %s, W8, Ws, b,
                                                                                %t, up, bf16)

The branch reads the 8 bits that the linear reads, whatever op has rounded them: the tokens are read
once more in one byte a number, and nothing that was fused before the linear comes apart. A linear
that adds to the residual stream is two ops again, and one that rounds what comes behind its GELU is
three. Linears in floating point get two more linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes import fuse_linear_gelu

aten = torch.ops.aten
ops = torch.ops.wancompile

LINEARS: tuple[Any, ...] = (
    ops.scaled_linear.default,
    ops.scaled_linear_residual.default,
    ops.linear_gelu_quantize.default,
    aten.linear.default,
)


@dataclass(frozen=True)
class Slot:
    """Room for `rank` directions beside the stored weight `weight`, one tensor for all its readers.

    `down [rank, K]` and `up [N, rank]` name stored tensors in the type of the weight if it is a
    float, and in that of the pass if it is not.
    Where `bias` names the stored bias of these linears, they read `shift [N]` fp32 in its place.
    """

    weight: str
    rank: int
    bias: str = ""

    @property
    def down(self) -> str:
        """The name of A."""
        return f"low_rank.{self.weight}.down"

    @property
    def up(self) -> str:
        """The name of B."""
        return f"low_rank.{self.weight}.up"

    @property
    def shift(self) -> str:
        """The name of the bias."""
        return f"low_rank.{self.weight}.shift"


@dataclass(frozen=True)
class AddLowRank:
    """Add a branch, computed in `dtype`, to every linear that reads the weight of a slot."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype

    name: ClassVar[str] = "add_low_rank"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look at every linear whose weight is stored."""
        fresh = [slot for slot in self.slots if slot.down not in draft.state]
        slots = {slot.weight: slot for slot in fresh}
        for node in match.nodes_of(draft.graph, *LINEARS):
            slot = slots.get(str(weight_of(node).target))
            if slot is None or not match.is_constant(weight_of(node)):
                continue
            branch = _Branch(draft, node, slot, self.dtype)
            _ADDED[node.target](branch)
            draft.did(slot.weight, f"room for rank {slot.rank}")


def weight_of(linear: Node) -> Any:
    """Return the weight that one of `LINEARS` reads."""
    return match.args(linear)[1 if match.is_float_linear(linear) else 2]


def bias_of(linear: Node) -> Any:
    """Return the bias that one of `LINEARS` reads, or None."""
    if match.is_float_linear(linear):
        return match.arg(linear, 2, "bias")
    return match.args(linear)[4]


class _Branch:
    """What is put beside one linear."""

    def __init__(self, draft: Draft, node: Node, slot: Slot, dtype: torch.dtype) -> None:
        self.draft, self.node, self.slot = draft, node, slot
        self._weight = match.val(weight_of(node))
        self.dtype = self._weight.dtype if match.is_float_linear(node) else dtype

    def call(self, target: Any, *args: Any) -> Node:
        return self.draft.call(target, *args, before=self.node, like=self.node)

    def replace(self, target: Any, *args: Any) -> None:
        self.draft.replace_call(self.node, target, *args)

    def down(self) -> Node:
        return self._zeros(self.slot.down, self.slot.rank, self._weight.shape[1])

    def up(self) -> Node:
        return self._zeros(self.slot.up, self._weight.shape[0], self.slot.rank)

    def bias(self) -> Any:
        if not self.slot.bias:
            return bias_of(self.node)
        if self.slot.shift not in self.draft.state:
            bias = self.draft.state[self.slot.bias]
            self.draft.keep(self.slot.shift, bias.to(self._place, torch.float32, copy=True))
        stored = self.draft.read(self.slot.shift, before=self.node)
        # A float linear wants its bias in its own type.
        is_float = match.is_float_linear(self.node)
        return self.draft.cast(stored, self._weight.dtype, before=self.node) if is_float else stored

    def _zeros(self, name: str, *shape: int) -> Node:
        if name not in self.draft.state:
            self.draft.keep(name, torch.zeros(shape, dtype=self.dtype, device=self._place))
        return self.draft.read(name, before=self.node)

    @property
    def _place(self) -> torch.device:
        """Where the graph computes, which is not where a weight is that waits on the host."""
        stored = self.draft.state[self.slot.weight].device
        return stored if stored.type == "meta" else self._weight.device


def _add_to_scaled(branch: _Branch) -> None:
    *linear, _, out_dtype = match.args(branch.node)
    operands = _operands(branch, *linear)
    branch.replace(ops.scaled_linear_low_rank.default, *operands, out_dtype)


def _add_to_residual(branch: _Branch) -> None:
    *linear, _, residual, gate = match.args(branch.node)
    out_dtype = match.val(residual).dtype
    operands = _operands(branch, *linear)
    y = branch.call(ops.scaled_linear_low_rank.default, *operands, out_dtype)
    branch.replace(ops.add_gated.default, residual, y, gate, None, None)


def _add_before_gelu(branch: _Branch) -> None:
    *linear, _ = match.args(branch.node)[:5]
    operands = _operands(branch, *linear)
    out_dtype = fuse_linear_gelu.between(branch.node)
    target = ops.scaled_linear_low_rank.default
    fuse_linear_gelu.split(branch.draft, branch.node, target, *operands, out_dtype)


def _operands(branch: _Branch, x: Node, scale: Node, *weight: Node) -> tuple[Any, ...]:
    """Return the operands of `scaled_linear_low_rank` but for the type of its result."""
    low = branch.call(ops.low_rank_down.default, x, scale, branch.down())
    return x, scale, *weight, branch.bias(), low, branch.up()


def _add_to_float(branch: _Branch) -> None:
    x, weight, *_ = match.args(branch.node)
    linear = aten.linear.default
    y = branch.call(linear, x, weight, branch.bias())
    low = branch.call(linear, x, branch.down())
    branch.replace(aten.add.Tensor, y, branch.call(linear, low, branch.up()))


_ADDED: dict[Any, Callable[[_Branch], None]] = dict(
    zip(LINEARS, (_add_to_scaled, _add_to_residual, _add_before_gelu, _add_to_float), strict=True)
)
