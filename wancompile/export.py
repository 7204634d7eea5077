"""model + example inputs -> a Program at level EXPORTED."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from wancompile import sizes
from wancompile.errors import ExportError, InputError, NumericsError
from wancompile.ir import edit, match
from wancompile.ir.levels import Level
from wancompile.ir.site import Site
from wancompile.program import Program
from wancompile.signature import InputSpec, Signature, flatten, name_arguments, parameters_of

Call = Mapping[str, Any]

# Parts of the paths of files that are not the model's.
_LIBRARY = ("/torch/", "/wancompile/", "contextlib")
# Where torch cannot go on because it would have to know the numbers in a tensor.
_BY_VALUE = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


def export(
    model: torch.nn.Module,
    calls: Sequence[Call],
    *,
    dynamic: bool = True,
) -> Program:
    """Capture `model` as a graph that holds for every call shaped like `calls`.

    Args:
        model: the model, on any device, meta included; it is put in eval mode for the capture and
            left as it was found.
        calls: named arguments of one or more calls of `model.forward`; dimensions that differ
            between calls are dynamic, and so are batch, frames, height, width and the tokens of
            timesteps.
        dynamic: False fixes every dimension to that of the first call, which exports faster.

    Raises:
        InputError: the calls do not name the same tensors.
        ExportError: torch.export refuses the model, or makes a dynamic dimension static.
    """
    arguments = [_arguments(model, call) for call in calls]
    _check_alike(arguments)
    dims = sizes.dynamic_dims(arguments) if dynamic else {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return _captured(model, arguments[0], dims)
    finally:
        for module, flag in training.items():
            module.training = flag


def _captured(model: torch.nn.Module, call: Call, dims: sizes.Dims) -> Program:
    """Capture with the first reading of the example that the model takes."""
    failures: list[ExportError] = []
    for example, opened in sizes.examples(call, dims):
        try:
            exported = _export(model, example, opened)
        except ExportError as error:
            failures.append(error)
        else:
            return _program(exported, model, example, opened)
    raise failures[0]


def _arguments(model: torch.nn.Module, call: Call) -> dict[str, Any]:
    parameters, defaults = parameters_of(model.forward)
    arguments = name_arguments(parameters, defaults, (), call)
    missing = [name for name in parameters if name not in arguments]
    if missing:
        raise InputError(f"forward needs {missing[0]!r}, which the example leaves out")
    # diffusers models wrap their output in a dataclass on request; the graph yields the tensors.
    if "return_dict" in arguments:
        arguments["return_dict"] = False
    return arguments


def _check_alike(arguments: Sequence[Mapping[str, Any]]) -> None:
    first = sizes.tensors(arguments[0])
    if not first:
        raise InputError("the example inputs hold no tensor")
    for index, other in enumerate(map(sizes.tensors, arguments[1:]), start=1):
        odd = sorted(first.keys() ^ other.keys())
        if odd:
            absent = "leaves out" if odd[0] in first else "adds"
            raise InputError(f"sample {index} {absent} the tensor {odd[0]!r}, unlike sample 0")
        for name, tensor in other.items():
            if tensor.dim() != first[name].dim():
                raise InputError(
                    f"{name} has {tensor.dim()} dimensions in sample {index}, "
                    f"{first[name].dim()} in sample 0"
                )


def _export(
    model: torch.nn.Module, example: Mapping[str, Any], dims: sizes.Dims
) -> ExportedProgram:
    def spec(name: str, leaf: Any) -> Any:
        return dict.fromkeys(sorted(dims[name]), Dim.AUTO) if dims.get(name) else None

    shapes = sizes.map_leaves(example, spec) if any(dims.values()) else None
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    try:
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        where, reason = _culprit(error)
        raise ExportError(
            f"torch.export cannot capture the model: {reason}", source=where
        ) from error


def _culprit(error: BaseException) -> tuple[str | None, str]:
    """Return the innermost line of the model's own code on the way to `error`, and its reason.

    With the reason comes what to do, unless it was the model itself that refused the example.
    """
    where, raised_by_model = None, False
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        raised_by_model = not any(
            part in file for part in ("/torch/", "/wancompile/", "contextlib")
        )
        if raised_by_model:
            where = f"{file}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return where, reason if raised_by_model else f"{reason.rstrip('.')}; {_advice(error)}"


def _advice(error: BaseException) -> str:
    """Return what to do about a line that torch cannot capture."""
    around = 'torch.compile(model, backend="wancompile") compiles what lies around it'
    if isinstance(error, _BY_VALUE):
        return (
            "this line decides by the values in a tensor, which a graph cannot: choose with "
            f"torch.where, or decide before the model is called, by an argument; or {around}"
        )
    return f"write this line in torch's own functions of tensors; or {around}"


def _program(
    exported: ExportedProgram,
    model: torch.nn.Module,
    example: Mapping[str, Any],
    dims: sizes.Dims,
) -> Program:
    graph = edit.copy_graph(exported.graph)
    _join_pieces(graph, _numbers_of(model))
    state = _lift_state(graph, exported)
    check_finite(state)
    leaves = flatten(example)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = []
    for node, (name, leaf) in zip(placeholders, leaves.items(), strict=True):
        if isinstance(leaf, torch.Tensor):
            inputs.append(_input_spec(name, node))
            node.target = node.name
        else:
            graph.erase_node(node)
    _check_open(inputs, dims, sizes.video_of(sizes.tensors(example)))
    parameters, defaults = parameters_of(model.forward)
    signature = Signature(
        parameters=parameters,
        defaults={name: None if name == "return_dict" else v for name, v in defaults.items()},
        inputs=tuple(inputs),
        constants={
            name: leaf
            for name, leaf in leaves.items()
            if not isinstance(leaf, torch.Tensor) and name != "return_dict"
        },
        output=exported.call_spec.out_spec,
    )
    program = Program(graph, state, Level.EXPORTED, signature)
    program.verify()
    return program


def _numbers_of(model: torch.nn.Module) -> list[str]:
    """Return the parameters of a forward that are said to be whole numbers, or None."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [one.name for one in parameters if re.search(r"\bint\b", str(one.annotation))]


def _join_pieces(graph: Graph, numbers: Sequence[str]) -> None:
    """Take a cut of an open dimension into pieces of a fixed length away, where there is one piece.

    That is what the cut was for this example, and what it says: rows are seen to in portions.
    `numbers` are the arguments that may say how long these are.

    Raises:
        ExportError: there are several pieces, and their number would be that of the example.
    """
    for node in match.nodes_of(graph, torch.ops.aten.split.Tensor):
        whole, length = match.args(node)[:2]
        dim = match.dim_of(match.arg(node, 2, "dim", 0), match.rank(whole))
        if not (match.is_symbolic(match.shape(whole)[dim]) and isinstance(length, int)):
            continue
        if len(node.meta["val"]) > 1:
            known = f", such as {' or '.join(numbers)}" if numbers else ""
            raise ExportError(
                f"a dimension that may change is cut into pieces of {length}, and a graph has a "
                f"fixed number of them, {len(node.meta['val'])} in this example: call the model "
                "such that there is one piece, as with a large number for an argument that says "
                f"how long they are{known}",
                source=match.source_line(node),
            )
        for piece in list(node.users):
            piece.replace_all_uses_with(whole)
            graph.erase_node(piece)
        graph.erase_node(node)


def _input_spec(name: str, node: Node) -> InputSpec:
    tensor: torch.Tensor = node.meta["val"]
    shape = tuple(None if match.is_symbolic(size) else int(size) for size in tensor.shape)
    return InputSpec(name, shape, tensor.dtype)


def _check_open(inputs: Iterable[InputSpec], dims: sizes.Dims, video: str | None) -> None:
    """Refuse a model that fixes the batch, frames, height or width of its video."""
    for one in inputs:
        fixed = [dim for dim in sorted(dims.get(one.name, ())) if one.shape[dim] is not None]
        if one.name == video and fixed:
            raise ExportError(
                f"dimension {fixed[0]} of {one.name} must stay dynamic, but the model fixes it "
                f"to {one.shape[fixed[0]]}"
            )


def _lift_state(graph: Graph, exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Turn the placeholders of parameters, buffers and constants into reads of stored tensors."""
    tensors = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
    tensors.update({k: v for k, v in exported.constants.items() if isinstance(v, torch.Tensor)})
    # By position: copying a graph renames placeholders that are called like a Python builtin.
    placeholders = graph.find_nodes(op="placeholder")
    names = {
        node: str(spec.target)
        for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True)
        if spec.kind is not InputKind.USER_INPUT
    }
    read_stored(graph, names)
    return {name: tensors[name].detach() for name in names.values()}


def read_stored(graph: Graph, names: Mapping[Node, str]) -> None:
    """Turn placeholders into reads of the stored tensors that `names` gives them."""
    for node, name in names.items():
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name)
        read.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(read)
        graph.erase_node(node)


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Raise `NumericsError` naming the first stored tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # The sum of finite numbers is finite in fp32 at any size met here; NaN and inf survive it.
        if not torch.isfinite(tensor.abs().amax() if tensor.numel() else torch.zeros(())):
            raise NumericsError(
                "a weight holds NaN or infinity", site=str(Site(name)), pass_name="export"
            )
