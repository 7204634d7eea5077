"""A graph at level FUSED as JSON, and back with fake values on every node.

    {"input": "hidden_states"}
    {"read": "patch_embedding.weight", "name": "patch_embedding_weight"}
    {"call": "aten.silu.default", "name": "silu", "args": [{"node": "linear"}], "kwargs": {},
     "site": ..., "module": ..., "source": ...}
    {"return": [{"node": "reshape_7"}]}

Of a node's `meta` only what the compiler relies on is written: its site, the module and the line of
the model it comes from. Values are not: the ops' fakes compute them anew from those of the inputs.

torch.fx turns a graph into Python. What it copies into that text as it is, is checked here: names
of values are those that fx itself would give, stored tensors are among the known ones, keywords are
those of the op, and ops are looked up in the list of the level.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node, map_arg

from wancompile.artifact import values
from wancompile.errors import ArtifactError
from wancompile.ir import match
from wancompile.ir.levels import FUSED_OPS, NORMAL_OPS
from wancompile.ir.site import Site

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    owner = "operator" if getattr(operator, target.__name__, None) is target else "torch"
    return f"{owner}.{target.__name__}"


OPS: Mapping[str, Any] = {_name(target): target for target in NORMAL_OPS | FUSED_OPS}
"""Every op an artifact may name."""


def to_data(graph: Graph) -> list[dict[str, Any]]:
    """Return the nodes of `graph` in order, as JSON data.

    Raises:
        ArtifactError: a node calls an op or holds a constant that artifacts do not know.
    """
    return [_node_data(node) for node in graph.nodes]


def _node_data(node: Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": node.name}
    if node.op == "get_attr":
        return {"read": str(node.target), "name": node.name}
    if node.op == "output":
        return {"return": values.encode(node.args[0], _reference)}
    name = _name(node.target)
    if OPS.get(name) is not node.target:
        raise ArtifactError(
            f"the op {name} cannot be saved",
            site=match.module_path(node) or None,
            source=match.source_line(node),
        )
    found = {
        "call": name,
        "name": node.name,
        "args": [values.encode(one, _reference) for one in node.args],
        "kwargs": {key: values.encode(one, _reference) for key, one in node.kwargs.items()},
    }
    origin = {
        "site": str(match.site(node) or ""),
        "module": match.module_path(node),
        "source": match.source_line(node) or "",
    }
    return {**found, **{key: text for key, text in origin.items() if text}}


def _reference(value: Any) -> Any:
    return {"node": value.name} if isinstance(value, Node) else None


def from_data(
    nodes: Sequence[Mapping[str, Any]],
    inputs: Sequence[torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    mode: FakeTensorMode,
) -> Graph:
    """Return the graph that `to_data` wrote.

    Args:
        nodes: what `to_data` returned.
        inputs: the fake tensors of the placeholders, in order.
        stored: a fake tensor for each stored one.
        mode: the mode in which all fakes live.

    Raises:
        ArtifactError: an op is not known, or a node is none that `to_data` writes.
    """
    shares = all(data.get("call") != _name(torch.ops.aten.item.default) for data in nodes)
    builder = _Builder(list(inputs), stored, mode, shares)
    for data in nodes:
        builder.add(data)
    return builder.graph


class _Builder:
    """Makes a graph node by node.

    Blocks of a model do the same to values of the same kind, and a fake costs milliseconds where
    sizes are symbolic. So calls of one op with equal constants on equal fakes are evaluated once,
    unless the graph reads numbers out of tensors (`item`): there, equal fakes differ.
    """

    def __init__(
        self,
        inputs: list[torch.Tensor],
        stored: Mapping[str, torch.Tensor],
        mode: FakeTensorMode,
        shares: bool,
    ) -> None:
        self.graph = Graph()
        self._inputs = inputs
        self._stored = stored
        self._mode = mode
        self._shares = shares
        self._nodes: dict[str, Node] = {}
        self._results: dict[Any, Any] = {}
        self._kinds: dict[Any, Any] = {}

    def add(self, data: Mapping[str, Any]) -> None:
        if "input" in data:
            self._add_input(data["input"])
        elif "read" in data:
            self._add_read(data["read"], data["name"])
        elif "call" in data:
            self._add_call(data)
        elif "return" in data:
            self.graph.output(self._value(data["return"]))
        else:
            raise ArtifactError(f"{data!r} is no node of a graph")

    def _add_input(self, name: str) -> None:
        if not self._inputs:
            raise ArtifactError(f"the graph takes {name}, which the signature does not know")
        self._make("placeholder", name, name, (), {}, self._inputs.pop(0))

    def _add_read(self, target: str, name: str) -> None:
        if target not in self._stored:
            raise ArtifactError(f"the graph reads {target}, which is not stored")
        self._make("get_attr", target, name, (), {}, self._stored[target])

    def _add_call(self, data: Mapping[str, Any]) -> None:
        target = OPS.get(data["call"])
        if target is None:
            raise ArtifactError(
                f"the op {data['call']} is not known here, so the graph cannot be rebuilt",
                site=data.get("module"),
                source=data.get("source"),
            )
        args = tuple(self._value(one) for one in data["args"])
        kwargs = {key: self._value(one) for key, one in data["kwargs"].items()}
        unknown = kwargs.keys() - _keywords(target)
        if unknown:
            raise ArtifactError(f"{data['call']} has no argument {min(unknown)!r}")
        node = self._make("call_function", target, data["name"], args, kwargs, None)
        node.meta["val"] = self._result(node, data)
        _remember_origin(node, data)

    def _make(
        self, op: str, target: Any, name: str, args: Any, kwargs: Any, value: torch.Tensor | None
    ) -> Node:
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise ArtifactError(f"{name!r} cannot be the name of a value")
        node.meta["val"] = self._one_of_kind(value)
        self._nodes[name] = node
        return node

    def _result(self, node: Node, data: Mapping[str, Any]) -> Any:
        if not self._shares:
            return self._evaluate(node, data)
        key = (node.target, _key(node.args), _key(node.kwargs))
        if key not in self._results:
            self._results[key] = self._one_of_kind(self._evaluate(node, data))
        return self._results[key]

    def _one_of_kind(self, value: Any) -> Any:
        """Return the first fake value that was equal to `value` in all that a fake knows."""
        if not self._shares or value is None:
            return value
        if isinstance(value, (tuple, list)):
            return type(value)([self._one_of_kind(one) for one in value])
        return self._kinds.setdefault(_kind(value), value)

    def _evaluate(self, node: Node, data: Mapping[str, Any]) -> Any:
        def value(parent: Node) -> Any:
            return parent.meta["val"]

        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        try:
            with self._mode, torch.no_grad():
                return match.target(node)(*args, **kwargs)
        except Exception as error:
            raise ArtifactError(
                f"{data['call']} does not take what the graph gives it: {error}",
                site=data.get("module"),
                source=data.get("source"),
            ) from error

    def _value(self, data: Any) -> Any:
        return values.decode(data, {"node": self._node})

    def _node(self, name: str) -> Node:
        if name not in self._nodes:
            raise ArtifactError(f"the graph reads the value {name} before it exists")
        return self._nodes[name]


def _kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value), _size(value)
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return value.dtype, value.device, tuple(map(_size, sizes))


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, _SYMBOLIC) else value


def _key(value: Any) -> Any:
    """Return what tells calls apart: constants by type, too, for 1, 1.0 and True are equal."""
    if isinstance(value, Node):
        fake = value.meta["val"]
        return tuple(map(id, fake)) if isinstance(fake, (tuple, list)) else id(fake)
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    return type(value), str(value)


def _keywords(target: Any) -> set[str]:
    if not isinstance(target, torch._ops.OpOverload):
        return set()
    return {one.name for one in target._schema.arguments}


def _remember_origin(node: Node, data: Mapping[str, Any]) -> None:
    """Put back what `match.site`, `match.module_path` and `match.source_line` read."""
    if "site" in data:
        node.meta["site"] = Site.parse(data["site"])
    if "module" in data:
        node.meta["nn_module_stack"] = {data["module"]: (data["module"], "")}
    if "source" in data:
        node.meta["stack_trace"] = f"File {data['source']}"
