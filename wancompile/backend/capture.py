"""dynamo's graph -> a graph at level EXPORTED, without the tensors it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from wancompile.backend.names import Names, Origin, parts_of
from wancompile.errors import ExportError, InputError
from wancompile.export import check_finite, read_stored
from wancompile.ir import edit, match
from wancompile.ir.levels import Level
from wancompile.program import Program
from wancompile.signature import InputSpec, Signature

aten = torch.ops.aten


@dataclass(frozen=True)
class Captured:
    """A graph at level EXPORTED without the tensors it reads.

    `stored` are the names of those, by their position among dynamo's arguments; `inputs` are the
    positions of the others, in the order of the graph's placeholders.
    """

    graph: Graph
    signature: Signature
    stored: Mapping[int, str]
    inputs: tuple[int, ...]

    def program(self, args: Sequence[Any]) -> Program:
        """Return the program with the stored tensors among `args`."""
        state = {name: args[at].detach() for at, name in self.stored.items()}
        check_finite(state)
        program = Program(self.graph, state, Level.EXPORTED, self.signature)
        program.verify()
        return program

    def call(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the program among `args`, by name."""
        names = (spec.name for spec in self.signature.inputs)
        return dict(zip(names, (args[at] for at in self.inputs), strict=True))


def capture(gm: GraphModule) -> Captured:
    """Return dynamo's graph in aten ops, its weights apart from its inputs.

    Raises:
        ExportError: the graph cannot be traced to aten.
        InputError: the model drops out, so it is in training mode.
    """
    found = [node for node in gm.graph.nodes if node.op == "placeholder"]
    origins = [Origin.of(node) for node in found]
    _fix_floats([node for node, one in zip(found, origins, strict=True) if not one.is_given])
    names = Names.of_modules_in(origin.spelling for origin in origins if origin.is_stored)
    graph = _to_aten(gm)
    _clean(graph, names)
    placeholders = _read_placeholders(graph)
    frozen = [at for at in placeholders if origins[at].is_stored]
    stored = _distinct({at: names.name(origins[at].spelling) for at in frozen})
    read_stored(graph, {placeholders[at]: name for at, name in stored.items()})
    inputs = [at for at in placeholders if at not in stored]
    called = _distinct({at: parts_of(origins[at].spelling)[-1] for at in inputs})
    specs = tuple(_spec(called[at], placeholders[at]) for at in inputs)
    output: Any = graph.output_node().args[0]
    signature = Signature(
        parameters=tuple(spec.name for spec in specs),
        defaults={},
        inputs=specs,
        constants={},
        output=pytree.tree_structure(tuple(object() for _ in output)),
    )
    return Captured(graph, signature, stored, tuple(inputs))


def _fix_floats(found: Iterable[Node]) -> None:
    """Have dynamo start over with these floats as numbers, and guards that they stay the same.

    It takes numbers that the model holds, and the likes of `math.pi`, for inputs, which would hide
    what a formula computes. This is how torch's own backends ask for it.
    """
    values = [getattr(node.meta["example_value"], "item_memo", None) for node in found]
    floats = [value for value in values if isinstance(value, torch.SymFloat)]
    for value in floats:
        TensorifyState.specialize(value.node._expr.name)
    if floats:
        raise TensorifyScalarRestartAnalysis


def _to_aten(gm: GraphModule) -> Graph:
    """Trace dynamo's graph of torch calls to aten calls, composite ones left whole."""
    values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))

    def run(*args: Any) -> Any:
        return Interpreter(gm).run(*args, enable_io_processing=False)

    # In the mode that dynamo used, sizes keep the symbols that dynamo guards on.
    try:
        with torch.no_grad(), next(modes), fx_traceback.preserve_node_meta():
            traced = make_fx(run, pre_dispatch=True)(*map(_settled, values)).graph
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"dynamo's graph cannot be traced to aten: {first}") from error
    # A copy belongs to no module, so that it may read what that module does not hold.
    return edit.copy_graph(traced)


def _settled(value: Any) -> Any:
    """Return a fake tensor that has numbers for the sizes that dynamo found to be fixed."""
    if not isinstance(value, FakeTensor):
        return value
    sizes, strides = map(_numbers, (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _numbers(sizes: Iterable[Any]) -> list[Any]:
    return [size if match.is_symbolic(size) else int(size) for size in sizes]


# They steer how torch records calls; autocast can only be one that is switched off.
_STEERING = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def _clean(graph: Graph, names: Names) -> None:
    """Drop what steered the trace and what nobody reads, and name modules as the model does."""
    for node in [node for node in reversed(graph.nodes) if node.target in _STEERING]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {
            key: (names.name(spelling), kind) for key, (spelling, kind) in stack.items()
        }
        if match.is_op(node, aten.dropout.default) and all(match.args(node)[1:]):
            raise InputError(
                "the model is in training mode, it drops out: call model.eval()",
                site=match.module_path(node) or None,
                source=match.source_line(node),
            )


def _read_placeholders(graph: Graph) -> dict[int, Node]:
    """Return the placeholders by position, and erase those that nothing reads."""
    found = dict(enumerate(node for node in graph.nodes if node.op == "placeholder"))
    _read_sizes(graph, found.values())
    for node in [node for node in found.values() if not node.users]:
        graph.erase_node(node)
    return {at: node for at, node in found.items() if node.users}


def _read_sizes(graph: Graph, placeholders: Iterable[Node]) -> None:
    """Let the sizes that dynamo passes beside the tensors be read off the tensors."""
    nodes = list(placeholders)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    sizes = {
        symbol: (node, dim)
        for node in nodes
        if match.is_tensor(node)
        for dim, size in enumerate(match.shape(node))
        if (symbol := _symbol(size)) is not None
    }
    for node in nodes:
        value = node.meta["val"]
        if _symbol(value) not in sizes:
            continue
        with graph.inserting_before(first):
            read = graph.call_function(aten.sym_size.int, sizes[_symbol(value)])
        read.meta["val"] = value
        node.replace_all_uses_with(read)


def _symbol(size: Any) -> Any:
    """Return what a size is in dynamo's symbols, None where it is a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _spec(name: str, node: Node) -> InputSpec:
    if not match.is_tensor(node):
        return InputSpec(name, (), torch.int64)
    sizes = tuple(None if match.is_symbolic(size) else int(size) for size in match.shape(node))
    return InputSpec(name, sizes, match.val(node).dtype)


def _distinct(names: Mapping[int, str]) -> dict[int, str]:
    """Return the names with numbers behind those that were taken."""
    taken: dict[str, int] = {}
    for at, name in names.items():
        number = 0
        while (unique := f"{name}_{number}" if number else name) in taken:
            number += 1
        taken[unique] = at
    return {at: name for name, at in taken.items()}
