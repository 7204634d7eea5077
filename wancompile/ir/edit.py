"""The only code that changes a graph."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node, map_arg
from torch.utils import _pytree as pytree

from wancompile.ir import match
from wancompile.ir.site import Attention, Group, Site, Ungrouped
from wancompile.signature import Signature

# What a new node inherits from the one it replaces: where in the model it comes from.
_ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "site")


@dataclass(frozen=True)
class Note:
    """One thing a pass did, or did not do and why: where, in words, and the model's source line."""

    site: str
    text: str
    source: str | None = None


@dataclass
class Draft:
    """A private working copy that a pass edits; the runner turns it into the next program.

    Invariants: every node the draft creates carries its fake value in `meta["val"]` and the origin
    of the node it stands for; stored tensors are never written in place, a change of value is a
    new tensor in `state`. A pass that changes what the graph takes or returns says so in
    `signature`; None leaves that of the program.
    """

    graph: Graph
    state: dict[str, torch.Tensor]
    groups: tuple[Group, ...] = ()
    ungrouped: tuple[Ungrouped, ...] = ()
    attentions: tuple[Attention, ...] = ()
    signature: Signature | None = None
    done: list[Note] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    _mode: FakeTensorMode | None = None

    @property
    def fake_mode(self) -> FakeTensorMode | None:
        """The mode that all fake values of this graph live in."""
        if self._mode is None:
            self._mode = next(
                (
                    value.fake_mode
                    for node in self.graph.nodes
                    if isinstance(value := node.meta.get("val"), FakeTensor)
                ),
                None,
            )
        return self._mode

    # Reporting ------------------------------------------------------------------------------

    def did(self, site: Site | Node | str, text: str) -> None:
        """Record that something was rewritten at `site`."""
        self.done.append(Note(_where(site), text))

    def skip(self, site: Site | Node | str, reason: str, node: Node | None = None) -> None:
        """Record that nothing was rewritten at `site`, and why; `node` tells the source line."""
        origin = node if node is not None else site
        source = match.source_line(origin) if isinstance(origin, Node) else None
        self.skipped.append(Note(_where(site), reason, source))

    # Stored tensors -------------------------------------------------------------------------

    def store(self, name: str, tensor: torch.Tensor, *, before: Node) -> Node:
        """Store `tensor` under `name` (made unique) and return a node that reads it."""
        name = self._unique(name)
        self.state[name] = tensor
        return self.read(name, before=before)

    def read(self, name: str, *, before: Node) -> Node:
        """Return a new node that reads the stored tensor `name`."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self._fake(self.state[name])
        return node

    def keep(self, name: str, tensor: torch.Tensor) -> str:
        """Store `tensor` under `name` (made unique) for a group to name it, and return the name."""
        name = self._unique(name)
        self.state[name] = tensor
        return name

    def forget(self, name: str) -> None:
        """Drop the stored tensor `name`, which no node reads any more."""
        self.state.pop(name, None)

    def _unique(self, name: str) -> str:
        if name not in self.state:
            return name
        number = 1
        while f"{name}_{number}" in self.state:
            number += 1
        return f"{name}_{number}"

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.fake_mode is None:
            return tensor.to("meta")
        return self.fake_mode.from_tensor(tensor, static_shapes=True)

    # Nodes ----------------------------------------------------------------------------------

    def call(
        self, target: Callable[..., Any], *args: Any, before: Node, like: Node, **kwargs: Any
    ) -> Node:
        """Insert a call of `target` before `before`; its origin is that of `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self._inherit(node, like)
        node.meta["val"] = self._evaluate(node)
        return node

    def scaled(self, operand: Node, factor: Node, *, before: Node) -> Node:
        """Insert `operand * factor`, kept in the type of `operand`."""
        product = self.call(torch.ops.aten.mul.Tensor, operand, factor, before=before, like=before)
        return self.cast(product, match.val(operand).dtype, before=before)

    def cast(self, node: Node, dtype: torch.dtype, *, before: Node) -> Node:
        """Insert a cast of `node` to `dtype` unless it has that type."""
        if match.val(node).dtype == dtype:
            return node
        return self.call(torch.ops.aten.to.dtype, node, dtype, before=before, like=before)

    def replace(self, old: Node, new: Node) -> None:
        """Let every reader of `old` read `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def replace_call(
        self, old: Node, target: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Node:
        """Replace `old` by a call of `target` in the same place; its site moves along."""
        new = self.call(target, *args, before=old, like=old, **kwargs)
        if "site" in old.meta:
            new.meta["site"] = old.meta["site"]
        self.replace(old, new)
        return new

    def take(self, name: str, like: Node) -> Node:
        """Add an input behind the others, which has the type and the shape of `like`."""
        with self.graph.inserting_after(match.inputs(self.graph)[-1]):
            node = self.graph.placeholder(name)
        node.meta["val"] = like.meta["val"]
        return node

    def drop_input(self, node: Node) -> None:
        """Erase an input, which no node reads any more."""
        self.graph.erase_node(node)

    def give(self, values: Sequence[Node]) -> None:
        """Let the graph return `values`, and nothing else."""
        self.graph.output_node().args = (list(values),)

    def redirect(self, reader: Node, old: Node, new: Node) -> None:
        """Let `reader` read `new` where it read `old`."""
        reader.replace_input_with(old, new)

    def set_args(self, node: Node, args: Sequence[Any]) -> None:
        """Give `node` other operands of the same shapes and types."""
        node.args = tuple(args)

    def sort(self) -> None:
        """Put every node behind what it reads, and otherwise keep the order.

        For passes that let an early node read a late one. Raises RuntimeError on a cycle.
        """
        order = match.position(self.graph)
        waiting = {node: len(set(node.all_input_nodes)) for node in order}
        ready = [(order[node], node) for node, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        last = self.graph._root
        for _ in order:
            if not ready:
                raise RuntimeError("the values of the graph depend on each other in a circle")
            _, node = heapq.heappop(ready)
            last.append(node)
            last = node
            for user in node.users:
                waiting[user] -= 1
                if waiting[user] == 0:
                    heapq.heappush(ready, (order[user], user))

    def erase_dead(self) -> None:
        """Erase nodes nobody reads (calls that write to a tensor stay), and unread state.

        Factors that a group says its weights were multiplied by stay.
        """
        # Random numbers are no reason to stay: torch counts attention among what draws them.
        self.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
        read = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for weight in (one for group in self.groups for one in group.weights):
            read |= {weight.inputs, weight.outputs}
        for name in [name for name in self.state if name not in read]:
            del self.state[name]

    def _inherit(self, node: Node, like: Node) -> None:
        for key in _ORIGIN_KEYS:
            if key != "site" and key in like.meta:
                node.meta[key] = like.meta[key]

    def _evaluate(self, node: Node) -> Any:
        def value(parent: Node) -> Any:
            return parent.meta["val"]

        args, kwargs = _mapped(node, value)
        mode: AbstractContextManager[Any] = self.fake_mode or nullcontext()
        # Decompositions in C++ read sizes as numbers: torch 2.11 has no linear without a bias for
        # open ones. Those in Python keep them symbolic.
        with mode, torch.no_grad(), enable_python_dispatcher():
            return match.target(node)(*args, **kwargs)


def _where(site: Site | Node | str) -> str:
    if isinstance(site, Node):
        return str(match.site(site) or match.module_path(site) or site.name)
    return str(site)


def copy_graph(graph: Graph) -> Graph:
    """Return a copy of `graph` that shares nothing mutable with it but the fake values."""
    copied = Graph()
    val_map: dict[Node, Node] = {}
    outputs: Any = copied.graph_copy(graph, val_map, return_output_node=True)
    result, old_output = outputs
    node = copied.output(result)
    node.meta = dict(old_output.meta)
    for old, new in val_map.items():
        new.meta = dict(old.meta)
    return copied


def evaluate_constant(
    node: Node,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Compute a node that reads only stored tensors, in `dtype`, ignoring float casts on the way.

    It is computed on `device`, or where the tensors are.

    Casts between floating-point types are rounding alone; one to integers means something.

    Folds multiply weights by scales as graph nodes; evaluating that tree at once in fp32 rounds a
    weight a single time, where running it node by node in bf16 would round at each step.
    """
    if node.op == "get_attr":
        tensor = state[str(node.target)]
        # Moved first, as it is stored: that is half the bytes, and the cast is quick over there.
        tensor = tensor if device is None else tensor.to(device)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    if match.is_op(node, torch.ops.aten.to.dtype) and _is_rounding(node):
        return evaluate_constant(match.args(node)[0], state, dtype=dtype, device=device)

    def value(parent: Node) -> Any:
        return evaluate_constant(parent, state, dtype=dtype, device=device)

    args, kwargs = _mapped(node, value)
    result: torch.Tensor = match.target(node)(*args, **kwargs)
    return result


def _is_rounding(cast: Node) -> bool:
    source: Node = match.args(cast)[0]
    return match.val(source).is_floating_point() and match.val(cast).is_floating_point()


def _mapped(node: Node, value: Callable[[Node], Any]) -> tuple[Any, Any]:
    """Return the arguments of `node` with `value(parent)` in place of each operand."""
    return map_arg(node.args, value), map_arg(node.kwargs, value)


def move(draft: Draft, device: torch.device) -> None:
    """Move the stored tensors to `device`, and the ops that name a device along with them."""
    draft.state = {name: tensor.to(device) for name, tensor in draft.state.items()}
    retarget(draft.graph, device)


def retarget(graph: Graph, device: torch.device) -> None:
    """Let the ops that name a device name `device`, and all values be there."""

    def moved(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        return torch.ops.aten._to_copy.default(value, device=device)  # `to` would initialize CUDA

    for node in graph.nodes:
        if "val" in node.meta and device.type != "meta":  # where fake tensors cannot be
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
        if any(isinstance(arg, torch.device) for arg in node.args):
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
