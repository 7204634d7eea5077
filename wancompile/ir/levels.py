"""The levels a program goes through, and the verifier of their invariants.

    EXPORTED -> NORMAL -> OBSERVED            (calibration)
                NORMAL -> QUANTIZED -> FUSED -> LOWERED

A level is a set of allowed ops plus invariants; `verify` is run by the runner after every pass.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch.fx import Graph, Node

from wancompile import ops as _ops  # noqa: F401  (defines torch.ops.wancompile)
from wancompile.errors import LevelError
from wancompile.ir import match
from wancompile.ir.site import Group, Site, Ungrouped
from wancompile.signature import InputSpec

aten = torch.ops.aten


class Level(IntEnum):
    """How far a program has been compiled.

    As captured; in one spelling, with groups and folds proved; the same with observers; in 8 bits;
    in fewer ops that compute the same; with kernels chosen for a device.
    """

    EXPORTED = 0
    NORMAL = 1
    OBSERVED = 2
    QUANTIZED = 3
    FUSED = 4
    LOWERED = 5


_OPERATORS = "add sub mul floordiv mod neg truediv pow eq ne lt le gt ge and_ or_"
SHAPE_ARITHMETIC: frozenset[Any] = frozenset(
    {
        aten.sym_size.int,
        aten.item.default,
        torch.sym_sum,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
        torch.sym_float,
        *(getattr(operator, name) for name in _OPERATORS.split()),
    }
)

# Every op here is pure: it neither writes to its inputs nor keeps state.
_PURE_ATEN = """
add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar
neg.default reciprocal.default abs.default exp.default log.default pow.Tensor_Scalar pow.Scalar
pow.Tensor_Tensor sqrt.default rsqrt.default square.default sin.default cos.default tanh.default
sigmoid.default silu.default gelu.default relu.default softplus.default erf.default clamp.default
clamp_min.default clamp_max.default maximum.default minimum.default where.self addcmul.default
floor.default round.default remainder.Tensor remainder.Scalar floor_divide.default
div.Tensor_mode div.Scalar_mode eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor
le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar ge.Tensor logical_not.default
logical_and.default logical_or.default masked_fill.Scalar
mean.dim mean.default sum.dim_IntList sum.default amax.default amin.default var.dim
var.correction var_mean.correction std.dim std.correction softmax.int _softmax.default
linalg_vector_norm.default
linear.default matmul.default mm.default bmm.default addmm.default baddbmm.default
conv1d.default conv2d.default conv3d.default conv3d.padding convolution.default
layer_norm.default rms_norm.default scaled_dot_product_attention.default
to.dtype to.device reshape.default permute.default expand.default squeeze.default squeeze.dim
squeeze.dims unsqueeze.default slice.Tensor select.int cat.default stack.default repeat.default
repeat_interleave.self_int flip.default roll.default index.Tensor index_select.default
embedding.default gather.default view_as_real.default view_as_complex.default
view.dtype polar.default complex.default outer.default constant_pad_nd.default pad.default
movedim.int movedim.intlist swapaxes.default tile.default diff.default cumsum.default
arange.default arange.start arange.start_step zeros.default ones.default full.default
zeros_like.default ones_like.default full_like.default new_zeros.default new_ones.default
new_full.default scalar_tensor.default triu.default tril.default diag_embed.default
leaky_relu.default linalg_qr.default
"""


def _overload(name: str) -> Any:
    packet, overload = name.rsplit(".", 1)
    return getattr(getattr(aten, packet, None), overload, None)


NORMAL_OPS: frozenset[Any] = (
    frozenset(found for name in _PURE_ATEN.split() if (found := _overload(name)) is not None)
    | SHAPE_ARITHMETIC
    | {operator.getitem}
)
OBSERVER_OPS: frozenset[Any] = frozenset(
    {torch.ops.wancompile.observe_channels.default, torch.ops.wancompile.observe_heads.default}
)
QUANTIZED_OPS: frozenset[Any] = frozenset(
    {
        torch.ops.wancompile.hadamard.default,
        torch.ops.wancompile.quantize_per_token.default,
        torch.ops.wancompile.quantize_per_tensor.default,
        torch.ops.wancompile.scaled_linear.default,
        torch.ops.wancompile.quantize_per_head.default,
        torch.ops.wancompile.scaled_attention.default,
    }
)
FUSED_OPS: frozenset[Any] = QUANTIZED_OPS | {
    torch.ops.wancompile.add_gated.default,
    torch.ops.wancompile.gelu_quantize.default,
    torch.ops.wancompile.linear_gelu_quantize.default,
    torch.ops.wancompile.low_rank_down.default,
    torch.ops.wancompile.norm_quantize.default,
    torch.ops.wancompile.norm_rotate.default,
    torch.ops.wancompile.norm_rotate_quantize.default,
    torch.ops.wancompile.norm_rotate_quantize_per_token.default,
    torch.ops.wancompile.repeated_rows.default,
    torch.ops.wancompile.residual_norm_quantize.default,
    torch.ops.wancompile.scaled_linear_low_rank.default,
    torch.ops.wancompile.scaled_linear_residual.default,
}


def _is_kernel(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "wancompile_kernels"


_ALLOWED: dict[Level, Callable[[Any], bool]] = {
    Level.EXPORTED: lambda target: (
        isinstance(target, torch._ops.OpOverload)
        or target in SHAPE_ARITHMETIC
        or target is operator.getitem
    ),
    Level.NORMAL: lambda target: target in NORMAL_OPS,
    Level.OBSERVED: lambda target: target in NORMAL_OPS or target in OBSERVER_OPS,
    Level.QUANTIZED: lambda target: target in NORMAL_OPS or target in QUANTIZED_OPS,
    Level.FUSED: lambda target: target in NORMAL_OPS or target in FUSED_OPS,
    Level.LOWERED: lambda target: target in NORMAL_OPS or target in FUSED_OPS or _is_kernel(target),
}


def verify(
    graph: Graph,
    level: Level,
    *,
    groups: Iterable[Group] = (),
    ungrouped: Iterable[Ungrouped] = (),
    state: Iterable[str] = (),
    inputs: Sequence[InputSpec],
    pass_name: str | None = None,
) -> None:
    """Raise `LevelError` unless `graph` keeps every invariant of `level`.

    Checked: only the level's ops are called; every node that yields a value carries it in
    `meta["val"]`; every constant that is read exists; the placeholders are the `inputs`, and each
    dimension that may change is still symbolic; and, from NORMAL to QUANTIZED, every linear has a
    site of its own that is in exactly one group or among the ungrouped.
    """
    names = set(state)
    for node in graph.nodes:
        _verify_node(node, level, names, pass_name)
    _verify_inputs(graph, inputs, pass_name)
    if Level.NORMAL <= level <= Level.QUANTIZED:
        _verify_partition(graph, groups, ungrouped, pass_name)


def _verify_node(node: Node, level: Level, names: set[str], pass_name: str | None) -> None:
    if node.op == "call_function" and not _ALLOWED[level](node.target):
        raise LevelError(
            f"the op {match.target_name(node)} is not known at level {level.name}",
            site=match.module_path(node) or None,
            source=match.source_line(node),
            pass_name=pass_name,
        )
    if node.op in ("call_module", "call_method"):
        raise LevelError(f"{node.op} nodes are not allowed: {node}", pass_name=pass_name)
    if node.op == "get_attr" and node.target not in names:
        raise LevelError(f"the graph reads {node.target}, which has no value", pass_name=pass_name)
    if node.op != "output" and "val" not in node.meta:
        raise LevelError(f"{node.format_node()} has no value", pass_name=pass_name)


def _verify_inputs(graph: Graph, inputs: Sequence[InputSpec], pass_name: str | None) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise LevelError(
            f"the graph has {len(placeholders)} placeholders for {len(inputs)} inputs",
            pass_name=pass_name,
        )
    for node, spec in zip(placeholders, inputs, strict=True):
        actual = match.shape(node) if match.is_tensor(node) else ()
        for dim, (expected, size) in enumerate(zip(spec.shape, actual, strict=True)):
            if expected is None and not match.is_symbolic(size):
                raise LevelError(
                    f"dimension {dim} of {spec.name} must stay dynamic, but became {size}",
                    pass_name=pass_name,
                )


def _verify_partition(
    graph: Graph,
    groups: Iterable[Group],
    ungrouped: Iterable[Ungrouped],
    pass_name: str | None,
) -> None:
    linears = [node for node in graph.nodes if match.is_linear(node)]
    for node in linears:
        if match.site(node) is None:
            source = match.source_line(node)
            raise LevelError(f"{node.name} has no site", source=source, pass_name=pass_name)
    present = Counter(site for node in linears if (site := match.site(node)) is not None)
    listed = Counter(site for group in groups for site in group.sites)
    listed.update(one.site for one in ungrouped)
    complaints: Mapping[str, Collection[Site]] = {
        "two linears have one site": _repeated(present),
        "a linear is in more than one group": _repeated(listed),
        "a linear is in no group and has no reason": present.keys() - listed.keys(),
        "a group names a linear that is not in the graph": listed.keys() - present.keys(),
    }
    for reason, sites in complaints.items():
        if sites:
            raise LevelError(reason, site=str(min(sites)), pass_name=pass_name)


def _repeated(counts: Mapping[Site, int]) -> set[Site]:
    return {site for site, count in counts.items() if count > 1}
