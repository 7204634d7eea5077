"""What one program does on one call, small enough to keep beside a model of any size."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from wancompile.ir import match
from wancompile.ir.blocks import block_outputs
from wancompile.ir.site import Site
from wancompile.ops.attention import quantized_values
from wancompile.program import Program
from wancompile.quant.numerics import QMAX
from wancompile.stream import place

# Of each value at most so many tokens are kept, and fewer where they are wide.
TOKENS, VALUES = 64, 1 << 16
_ROWS_AT_ONCE = 1 << 13


@dataclass(frozen=True, eq=False)
class Record:
    """The output of a program on one call, and samples of what it computed on the way.

    All tensors are on the host. A sample `[..., n, C]` holds the same tokens of the same value in
    every program; the heads of an attention are its channels, one after the other.

    Attributes:
        output: the tensors among what the program returned, whole.
        sites: a sample of the output of each linear and attention.
        blocks: a sample of what leaves each repeated block, by the path of the block.
        broken: how many values are NaN or infinite, for each place that has any.
        clipped: share of the sampled values that got the largest code, of those operands that have
            a scale from calibration: a linear's input, and of an attention the one with the most.
        own: relative L2 error of each 8-bit attention against a float one on the same operands,
            where the program still has these.
    """

    output: tuple[Tensor, ...]
    sites: Mapping[Site, Tensor]
    blocks: Mapping[str, Tensor]
    broken: Mapping[str, int]
    clipped: Mapping[Site, float]
    own: Mapping[Site, float]


def take(
    program: Program,
    call: Mapping[str, Any],
    sites: Iterable[Site] | None = None,
    *,
    blocks: bool = True,
    fused: bool = False,
    device: torch.device | None = None,
) -> tuple[Any, Record]:
    """Run `program` on `call`; return what it returns, and the record of it.

    Args:
        program: at any level, with weights.
        call: named arguments of forward; tensors may be anywhere.
        sites: of which samples are kept; all if not given.
        blocks: whether what leaves each block is sampled.
        fused: whether an op may stand for several of the model. What leaves a block is then told
            only where that is a sum: fused ops yield sums that have other readers, too, as values
            of the block, but what else a block ended in may be inside of an op of the next one.
        device: where to run; weights that are elsewhere come and go, see `stream`.
    """
    wanted = None if sites is None else frozenset(sites)
    run = place(program, device)
    leaving = block_outputs(run.walked) if blocks else {}
    if fused:
        leaving = {node: path for node, path in leaving.items() if _is_sum(node)}
    recorder = _Recorder(run.walked, leaving, wanted)
    output = run.watched(recorder, **on_device(call, device or program.device))
    leaves = tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    for leaf in leaves:
        recorder.count_broken(OUTPUT, leaf)
    kept = tuple(leaf.detach().cpu() for leaf in leaves)
    return output, Record(
        kept, recorder.sites, recorder.blocks, recorder.broken, recorder.clipped, recorder.own
    )


OUTPUT = "output"
"""How the output of the model is called among sites and blocks."""


def on_device(
    call: Mapping[str, Any], device: torch.device, *, copy: bool = False
) -> dict[str, Any]:
    """Return `call` with its tensors on `device`, as copies even if they are there already."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=copy)

    result: dict[str, Any] = pytree.tree_map_only(Tensor, moved, dict(call))
    return result


def tokens_of(x: Tensor) -> Tensor:
    """Return the sampled tokens of `x [..., S, C]`, at most `TOKENS` of the S; a vector whole."""
    return x[..., _chosen(x), :] if x.dim() > 1 else x


def _chosen(x: Tensor) -> Tensor:
    """Return which tokens of `x [..., S, C]` are sampled: drawn once and for all for each S."""
    count, width = x.shape[-2], max(1, x.numel() // max(1, x.shape[-2]))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    most = max(4, min(TOKENS, VALUES // width))
    return order[:most].sort().values.to(x.device)


@dataclass
class _Recorder:
    """Looks at every op of a run and keeps what a record wants."""

    graph: Graph
    leaving: Mapping[Node, str]
    wanted: frozenset[Site] | None
    sites: dict[Site, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    clipped: dict[Site, float] = field(default_factory=dict)
    own: dict[Site, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attentions = [node for node in self.graph.nodes if _is_8bit_attention(node)]
        self._attentions = frozenset(attentions)
        self._static = frozenset(node for node in self.graph.nodes if _has_static_input(node))
        self._rounding = {
            source: (node, index)
            for node in attentions
            for index in (0, 1)
            if (source := _rounded_from(match.args(node)[index])) is not None
        }
        self._floats: dict[tuple[Node, int], Tensor] = {}

    def __call__(self, node: Node, operands: tuple[Any, ...], result: Any) -> None:
        """Look at one op."""
        if node in self._rounding:
            self._floats[self._rounding[node]] = operands[0]
        site = match.site(node)
        if site is not None and (self.wanted is None or site in self.wanted):
            self.sites[site] = self._looked_at(str(site), _laid_out(node, result))
        if node in self.leaving:
            path = self.leaving[node]
            self.blocks[path] = self._looked_at(path, result)
        if node in self._static and site is not None:
            self.clipped[site] = _share_clipped(operands[0])
        if node in self._attentions and site is not None:
            self.clipped[site] = _clipped(operands)
            both = [self._floats.pop((node, index), None) for index in (0, 1)]
            if both[0] is not None and both[1] is not None:
                self.own[site] = _own_error(both[0], both[1], operands, result)

    def _looked_at(self, name: str, x: Tensor) -> Tensor:
        self.count_broken(name, x)
        return tokens_of(x).detach().cpu()

    def count_broken(self, name: str, x: Tensor) -> None:
        """Count what is NaN or infinite in `x`; the extremes tell first whether anything is."""
        if not x.numel() or bool(torch.isfinite(torch.stack([x.amin(), x.amax()])).all()):
            return
        parts = torch.split(x.flatten(0, -2), _ROWS_AT_ONCE) if x.dim() > 1 else [x]
        self.broken[name] = sum(int((~torch.isfinite(part)).sum()) for part in parts)


def _is_sum(node: Node) -> bool:
    """Whether `node` is a sum, or the one among what a fused op or a kernel for it yields."""
    if node.target is operator.getitem:
        return "residual" in match.target_name(match.args(node)[0]) and match.args(node)[1] == 0
    return any(word in match.target_name(node) for word in ("add", "residual"))


def _laid_out(node: Node, result: Tensor) -> Tensor:
    """Return the output of an attention `[B, H, S, D]` as `[B, S, H * D]`, any other as it is."""
    joins = _is_attention(node) and result.dim() == 4
    return result.transpose(1, 2).flatten(2) if joins else result


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and "attention" in match.target_name(node)


def _is_8bit_attention(node: Node) -> bool:
    """Whether `node` is `scaled_attention`, or a kernel for it."""
    return _is_attention(node) and match.val(match.args(node)[0]).dtype in QMAX


def _has_static_input(node: Node) -> bool:
    """Whether `node` reads 8 bits and then a stored scale of them, as a linear may."""
    if node.op != "call_function" or len(node.args) < 2 or not match.is_tensor(node.args[0]):
        return False
    return match.val(node.args[0]).dtype in QMAX and match.is_constant(node.args[1])


def _share_clipped(x: Tensor) -> float:
    """Return the share of the values of `x [..., S, C]` with the largest code, on its sample."""
    return float((tokens_of(x).float().abs() >= QMAX[x.dtype]).float().mean())


def _rounded_from(operand: Any) -> Node | None:
    """Return the op that rounds a float `[B, H, S, D]` to `operand`, if its float is an operand."""
    if not isinstance(operand, Node) or not operand.args or match.rank(operand) != 4:
        return None
    rounding: Any = operand.args[0] if operand.target is operator.getitem else operand
    if not match.is_tensor(rounding.args[0]):
        return None
    source = match.val(rounding.args[0])
    is_float = source.is_floating_point() and source.dtype.itemsize > 1
    return rounding if is_float and source.dim() == 4 else None


def _clipped(operands: tuple[Any, ...]) -> float:
    """Return the share of values with the largest code, of the operand that has the most."""
    q, k, v, q_scale, _, v_scale = operands[:6]
    rounded = [tokens_of(k)]
    if q_scale.dim() == 1:  # by scales of their own all queries reach the largest code
        rounded.append(tokens_of(q))
    if v_scale is not None:
        rounded.append(quantized_values(tokens_of(v), v_scale))
    shares = [(one.float().abs() >= QMAX[one.dtype]).float().mean() for one in rounded]
    return float(torch.stack(shares).amax())


def _own_error(q: Tensor, k: Tensor, operands: tuple[Any, ...], result: Tensor) -> float:
    """Return the relative L2 error of an attention on a sample of its queries, and all keys.

    Heads are looked at one by one, for in fp32 all of them take several times the memory.
    """
    v, scale = operands[2], operands[6]
    chosen = _chosen(q)
    lost, total = q.new_zeros((), dtype=torch.float64), q.new_zeros((), dtype=torch.float64)
    for head in range(q.shape[1]):
        # Centred keys may be wider than queries.
        query, key, value = (one[:, head].float() for one in (q[:, :, chosen], k, v))
        expected = F.scaled_dot_product_attention(query, key, value, scale=scale).double()
        lost += (result[:, head, chosen].double() - expected).square().sum()
        total += expected.square().sum()
    return float((lost / total.clamp_min(1e-60)).sqrt())
