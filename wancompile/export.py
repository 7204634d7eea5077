"""model + example inputs -> a Program at level EXPORTED."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from wancompile.errors import ExportError, InputError, NumericsError
from wancompile.ir import edit, match
from wancompile.ir.levels import Level
from wancompile.ir.site import Site
from wancompile.program import Program
from wancompile.signature import InputSpec, Signature, flatten, name_arguments, parameters_of

Call = Mapping[str, Any]

# Without a hint from the samples, these dimensions are taken to change from call to call, by the
# rank of the tensor: [batch, channels, frames, height, width], [batch, tokens, channels], and
# timesteps [batch] or [batch, tokens].
_DYNAMIC_DIMS: Mapping[int, tuple[int, ...]] = {
    5: (0, 2, 3, 4),
    4: (0,),
    3: (0,),
    2: (0, 1),
    1: (0,),
}


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
    dims = _dynamic_dims(arguments) if dynamic else {}
    example = _without_ones(arguments[0], dims)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            exported = _export(model, example, dims)
    finally:
        for module, flag in training.items():
            module.training = flag
    return _program(exported, model, example, dims)


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
    first = _tensors(arguments[0])
    if not first:
        raise InputError("the example inputs hold no tensor")
    for index, other in enumerate(map(_tensors, arguments[1:]), start=1):
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


def _tensors(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    leaves = flatten(arguments)
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def _dynamic_dims(arguments: Sequence[Mapping[str, Any]]) -> dict[str, set[int]]:
    samples = [_tensors(one) for one in arguments]
    batch = max(samples[0].values(), key=torch.Tensor.dim).shape[0]
    dims = {}
    for name, tensor in samples[0].items():
        expected = set(_DYNAMIC_DIMS.get(tensor.dim(), ()))
        # A short tensor of another length than the batch holds settings, not one entry per video.
        if tensor.dim() <= 2 and expected and tensor.shape[0] != batch:
            expected = set()
        varying = {
            dim
            for dim in range(tensor.dim())
            if len({sample[name].shape[dim] for sample in samples}) > 1
        }
        dims[name] = expected | varying
    return dims


def _without_ones(arguments: Mapping[str, Any], dims: Mapping[str, set[int]]) -> dict[str, Any]:
    """Double the dynamic dimensions of the example where one of them is 1.

    torch.export takes a size of 1 for a fact about the model, and so it does with a height or width
    of one patch. Doubling the same dimension of every tensor that has it keeps the sizes that
    belong together in step.
    """
    video = {name: t for name, t in _tensors(arguments).items() if dims.get(name)}
    factors = dict.fromkeys(range(5), 1)
    for name, tensor in video.items():
        for dim in dims[name]:
            one = 2 if dim in (3, 4) else 1
            if tensor.shape[dim] <= one and (dim == 0 or tensor.dim() == 5):
                factors[dim] = 2
    tokens = factors[2] * factors[3] * factors[4]

    def widen(name: str, leaf: Any) -> Any:
        if name not in video:
            return leaf
        repeats = [factors[0]] + [1] * (leaf.dim() - 1)
        if leaf.dim() == 5:
            repeats[2:] = [factors[2], factors[3], factors[4]]
        elif leaf.dim() == 2:
            repeats[1] = tokens
        return leaf.repeat(repeats) if any(r > 1 for r in repeats) else leaf

    return _map_leaves(arguments, widen)


def _map_leaves(arguments: Mapping[str, Any], fn: Callable[[str, Any], Any]) -> dict[str, Any]:
    return {
        name: pytree.tree_map_with_path(
            lambda path, leaf, name=name: fn(name + pytree.keystr(path), leaf), value
        )
        for name, value in arguments.items()
    }


def _export(
    model: torch.nn.Module, example: Mapping[str, Any], dims: Mapping[str, set[int]]
) -> ExportedProgram:
    def spec(name: str, leaf: Any) -> Any:
        return dict.fromkeys(sorted(dims[name]), Dim.AUTO) if dims.get(name) else None

    shapes = _map_leaves(example, spec) if any(dims.values()) else None
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    try:
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        where, reason = _culprit(error)
        raise ExportError(
            f"torch.export cannot capture the model: {reason}", source=where
        ) from error


def _culprit(error: BaseException) -> tuple[str | None, str]:
    """Return the innermost line of the model's own code on the way to `error`, and its reason."""
    where = None
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/wancompile/" not in file and "contextlib" not in file:
            where = f"{file}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    lines = str(error).strip().splitlines()
    return where, lines[0] if lines else type(error).__name__


def _program(
    exported: ExportedProgram,
    model: torch.nn.Module,
    example: Mapping[str, Any],
    dims: Mapping[str, set[int]],
) -> Program:
    graph = edit.copy_graph(exported.graph)
    state = _lift_state(graph, exported)
    check_finite(state)
    leaves = flatten(example)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = []
    for node, (name, leaf) in zip(placeholders, leaves.items(), strict=True):
        if isinstance(leaf, torch.Tensor):
            inputs.append(_input_spec(name, node, dims.get(name, set())))
            node.target = node.name
        else:
            graph.erase_node(node)
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


def _input_spec(name: str, node: Node, dynamic: Iterable[int]) -> InputSpec:
    tensor: torch.Tensor = node.meta["val"]
    sizes = [None if match.is_symbolic(size) else int(size) for size in tensor.shape]
    fixed = [dim for dim in dynamic if sizes[dim] is not None and tensor.dim() == 5]
    if fixed:
        raise ExportError(
            f"dimension {fixed[0]} of {name} must stay dynamic, but the model fixes it "
            f"to {sizes[fixed[0]]}"
        )
    return InputSpec(name, tuple(sizes), tensor.dtype)


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
