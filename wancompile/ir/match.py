"""Reading graphs: small questions about nodes. Nothing here changes a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from wancompile.ir.site import Site

aten = torch.ops.aten

# Ops whose output holds the same numbers as their first argument, laid out or rounded differently.
LAYOUT_OPS = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.expand.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
CAST_OPS = frozenset({aten.to.dtype})
SOFTMAX_OPS = frozenset({aten.softmax.int, aten._softmax.default})

_SYMBOLIC = (torch.SymBool, torch.SymInt, torch.SymFloat)

# Frames of torch itself say nothing about the model's source.
_LIBRARY_FRAMES = ("/torch/nn/", "/torch/_", "/torch/functional.py")


def is_op(node: Any, *targets: Any) -> TypeGuard[Node]:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_linear(node: Any) -> TypeGuard[Node]:
    """Whether `node` is a linear, in floating point or quantized."""
    return is_op(node, aten.linear.default, torch.ops.wancompile.scaled_linear.default)


def is_float_linear(node: Any) -> TypeGuard[Node]:
    """Whether `node` is a floating-point `aten.linear`."""
    return is_op(node, aten.linear.default)


def is_attention(node: Any) -> TypeGuard[Node]:
    """Whether `node` is a floating-point scaled-dot-product attention."""
    return is_op(node, aten.scaled_dot_product_attention.default)


def nodes_of(graph: Graph, *targets: Any) -> list[Node]:
    """Return the calls of `targets` in execution order."""
    return [node for node in graph.nodes if is_op(node, *targets)]


def inputs(graph: Graph) -> list[Node]:
    """Return the inputs of the graph in order."""
    return list(graph.find_nodes(op="placeholder"))


def val(node: Node) -> torch.Tensor:
    """Return the fake tensor that `node` yields."""
    value: torch.Tensor = node.meta["val"]
    return value


def shape(node: Node) -> torch.Size:
    """Return the shape of the tensor that `node` yields; dynamic dims are symbolic."""
    return val(node).shape


def rank(node: Node) -> int:
    """Return the number of dimensions of the tensor that `node` yields."""
    return val(node).dim()


def is_tensor(node: Any) -> TypeGuard[Node]:
    """Whether `node` yields one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_number(node: Node) -> bool:
    """Whether `node` yields a number, such as a size, and no tensor or several."""
    return isinstance(node.meta.get("val"), (int, float, *_SYMBOLIC))


def args(node: Node) -> tuple[Any, ...]:
    """Return the positional arguments, whose types the called op knows and torch.fx does not."""
    return tuple(node.args)


def target(node: Node) -> Any:
    """Return what `node` calls or reads."""
    return node.target


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def dim_of(dim: int, ndim: int) -> int:
    """Return `dim` counted from the front."""
    return dim + ndim if dim < 0 else dim


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, symbolic or not."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def is_symbolic(size: Any) -> bool:
    """Whether a size is still open; torch leaves a `SymInt` behind where it has fixed one."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def size_value(value: Any) -> Any:
    """Return the (symbolic) integer behind an argument that may be a node."""
    return value.meta["val"] if isinstance(value, Node) else value


def strip(node: Node, through: Iterable[Any] = CAST_OPS) -> Node:
    """Walk back from `node` along first arguments while it is a call of `through`."""
    targets = frozenset(through)
    while is_op(node, *targets) and isinstance(args(node)[0], Node):
        node = args(node)[0]
    return node


def widened_from(node: Node) -> Node:
    """Walk back over casts that lose nothing: from a float to one with as many bits or more."""
    while is_op(node, *CAST_OPS) and is_tensor(source := args(node)[0]):
        before, after = val(source).dtype, val(node).dtype
        if torch.promote_types(before, after) != after or not before.is_floating_point:
            break
        node = source
    return node


def narrowed_from(node: Node) -> Node:
    """Walk back over casts between floats, those that round included."""
    while is_op(node, *CAST_OPS) and is_tensor(source := args(node)[0]):
        if not (val(source).is_floating_point() and val(node).is_floating_point()):
            break
        node = source
    return node


def leads_only_to(node: Node, last: Node) -> bool:
    """Whether `last` is computed from `node` through values that nothing else reads."""
    while (reader := sole_reader(node)) is not None:
        if reader is last:
            return True
        node = reader
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """Return how a recipe calls an 8-bit type."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(dtype, str(dtype))


def operands(node: Node) -> tuple[Any, Any]:
    """Return both operands of a binary call."""
    return node.args[0], node.args[1]


def either(node: Node, test: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """Return `(match, other)` where one operand of a commutative call passes `test`."""
    left, right = operands(node)
    if test(left):
        return left, right
    if test(right):
        return right, left
    return None


def constant_number(value: Any) -> float | None:
    """Return the Python number that `value` is, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def is_constant(node: Any) -> TypeGuard[Node]:
    """Whether `node` reads a stored tensor."""
    return isinstance(node, Node) and node.op == "get_attr"


def reads_only_constants(node: Any) -> bool:
    """Whether the value of `node` depends on stored tensors alone (for small trees)."""
    if not isinstance(node, Node):
        return True
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    return all(reads_only_constants(parent) for parent in node.all_input_nodes)


def stored_name(node: Any) -> str | None:
    """Return the name of the (first) stored tensor that `node` is computed from, if from such only.

    A weight times a scale is still that weight.
    """
    if not reads_only_constants(node):
        return None
    while not is_constant(node):
        node = node.all_input_nodes[0]
    return str(node.target)


def readers(node: Node) -> list[Node]:
    """Return the calls that read the numbers of `node`; asking for its size does not count."""
    return [user for user in node.users if not is_op(user, aten.sym_size.int)]


def sole_reader(node: Node) -> Node | None:
    """Return the one call that reads the numbers of `node`, or None if there is not one."""
    found = readers(node)
    return found[0] if len(found) == 1 else None


def site(node: Node) -> Site | None:
    """Return the site of a linear or an attention."""
    found = node.meta.get("site")
    return found if isinstance(found, Site) else None


def by_site(graph: Graph) -> dict[Site, Node]:
    """Return the node of each site."""
    return {found: node for node in graph.nodes if (found := site(node)) is not None}


def module_path(node: Node) -> str:
    """Return the qualified name of the innermost module whose forward made `node`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path)


def source_line(node: Node) -> str | None:
    """Return `file:line, in function` of the model's code that made `node`."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [frame for frame in frames if not any(part in frame for part in _LIBRARY_FRAMES)]
    return (own or frames)[-1].removeprefix("File ").replace('"', "") if frames else None


def target_name(node: Node) -> str:
    """Return a readable name of what `node` calls."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return str(getattr(target, "__name__", target))


def backward(starts: Sequence[Node], stop: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield every node that `starts` depend on, not going past nodes for which `stop` holds.

    Each node is yielded once; the ones that stop the walk are yielded too.
    """
    seen: set[Node] = set()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            todo.extend(node.all_input_nodes)


def position(graph: Graph) -> dict[Node, int]:
    """Return the execution order of the nodes."""
    return {node: index for index, node in enumerate(graph.nodes)}


def is_getitem(node: Any) -> TypeGuard[Node]:
    """Whether `node` picks one of several outputs."""
    return is_op(node, operator.getitem)
