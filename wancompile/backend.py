"""`torch.compile(model, backend="wancompile")`: the compiler behind dynamo's front end.

    compiled = torch.compile(
        model, backend="wancompile", dynamic=True,
        options={"recipe": "int8", "stats": "stats.safetensors"},
    )
    with torch.inference_mode():
        video = compiled(**inputs)

Options:
    recipe: the name of a recipe or a `Recipe`; "int8" where left out.
    stats: a `Stats` of `wancompile.calibrate`, or the path it was saved to. With it the model is
        smoothed and may have 8-bit attention; without it scales come from each call's own data.

What to know:
    - It is for inference. A call that wants gradients is refused with an `InputError`.
    - Weights are frozen: quantized when a graph is first called. Dynamo hands them over at every
      call, so a weight that was replaced, or changed in place in a way that torch counts (an
      optimizer's step, `load_state_dict`), is noticed and quantized anew. Writes through `.data` are
      not counted: call `torch._dynamo.reset()` after them.
    - The model keeps its own weights beside the 8-bit ones. `wancompile.compile(..., consume=True)`
      is the way to hold only the latter.
    - Sites are named from the outermost module that dynamo sees; statistics fit if they were made
      for that module. Where dynamo compiles a block on its own (a graph break inside of it,
      `compile_repeated_blocks`), names start at the block and only the way without `stats` works.
    - A graph that holds no attention runs as it is, and the log says so at level INFO. A rule of the
      recipe has to match in every graph that is compiled.
    - With `dynamic=None` dynamo compiles for the first size it sees, and again, for all sizes, at the
      second; `dynamic=True` compiles, and stores 8-bit weights, once.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from wancompile import passes, pipeline
from wancompile.errors import CalibrationError, DetectionError, ExportError, InputError
from wancompile.export import check_finite, read_stored
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve
from wancompile.signature import InputSpec, Signature

log = logging.getLogger("wancompile")
aten = torch.ops.aten

Compiled = Callable[..., Any]


def wancompile_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Return what runs instead of `gm`: dynamo calls this once for each graph it captures.

    Raises:
        InputError: an option is unknown or of the wrong kind, or the call wants gradients.
        CalibrationError: the recipe needs statistics, or those given are of another model.
        WancompileError: as `wancompile.compile` does. Dynamo shows each of these as the
            `inner_exception` of its own `BackendCompilerFailed`.
    """
    if mode is not None:
        raise InputError(f"the backend has no mode {mode!r}: choose with options={{'recipe': ...}}")
    choice = _Choice.of(options or {})
    if not _may_attend(gm.graph):
        return _as_it_is(gm, "no attention")
    _refuse_gradients(example_inputs)
    captured = _capture(gm)
    try:
        return _Frozen(captured, choice, example_inputs)
    except DetectionError as error:
        return _as_it_is(gm, error.reason)


def _as_it_is(gm: GraphModule, reason: str) -> Compiled:
    log.info("a graph of %d nodes runs as it is: %s", len(gm.graph.nodes), reason)
    return gm.forward


# Options ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    recipe: Recipe
    stats: Stats | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Choice:
        unknown = [name for name in options if name not in ("recipe", "stats")]
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}; there are recipe, stats")
        recipe, stats = options.get("recipe", "int8"), options.get("stats")
        if not isinstance(recipe, (str, Recipe)):
            raise InputError(f"recipe is a name or a Recipe, not {type(recipe).__name__}")
        if isinstance(stats, (str, Path)):
            stats = Stats.load(stats)
        if not isinstance(stats, (Stats, type(None))):
            raise InputError(f"stats is a Stats or the path of one, not {type(stats).__name__}")
        chosen = resolve(recipe)
        if chosen.attention is not None and stats is None:
            raise CalibrationError(
                f"the recipe {chosen.name!r} needs calibrated scales for its 8-bit attention: "
                "give options={'stats': ...}"
            )
        return cls(chosen, stats)


# What is not compiled -----------------------------------------------------------------------------

# torch's own functions, not names of the model: without one of them nothing can be detected.
_ATTENTION = ("scaled_dot_product_attention", "softmax")


def _may_attend(graph: Graph) -> bool:
    return any(
        node.op.startswith("call_") and match.target_name(node).startswith(_ATTENTION)
        for node in graph.nodes
    )


def _refuse_gradients(inputs: Iterable[Any]) -> None:
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )
    if wanted:
        raise InputError(
            "8-bit models are for inference, but this call wants gradients: call the model under "
            "torch.inference_mode() or torch.no_grad(), or call model.requires_grad_(False)"
        )


# Names --------------------------------------------------------------------------------------------

# Where a module keeps what its attributes name; dynamo spells them out.
_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})
_PART = re.compile(r"[^\[\]'\".()]+")


@dataclass(frozen=True)
class _Names:
    """Turns dynamo's `L['self']._modules['blocks'].0` into the model's `blocks.0`.

    `roots` spell the outermost modules. What belongs to the only one is named from there; several
    keep the last part of their spelling, so that their names differ.
    """

    roots: tuple[tuple[str, ...], ...]

    @classmethod
    def of_modules_in(cls, spellings: Iterable[str]) -> _Names:
        """Take as roots whatever owns a parameter, a buffer or a module and is owned by none."""
        found = dict.fromkeys(root for one in spellings if (root := _root(one)))
        return cls(tuple(sorted(found, key=len, reverse=True)))

    def name(self, spelling: str) -> str:
        parts = tuple(part for part in _parts(spelling) if part not in _REGISTRIES)
        for root in self.roots:
            if parts[: len(root)] == root:
                kept = len(root) if len(self.roots) == 1 else len(root) - 1
                return ".".join(parts[kept:])
        return ".".join(parts)


def _parts(spelling: str) -> tuple[str, ...]:
    return tuple(part for part in _PART.findall(spelling) if part != "__dict__")


def _root(spelling: str) -> tuple[str, ...]:
    parts = _parts(spelling)
    return next((parts[:i] for i, part in enumerate(parts) if part in _REGISTRIES), ())


@dataclass(frozen=True)
class _Origin:
    """Where dynamo found the value of a placeholder: how it spells it, and whether to freeze it."""

    spelling: str
    is_stored: bool

    @classmethod
    def of(cls, node: Node) -> _Origin:
        found = node.meta["grapharg"]
        # Properties of a source in newer versions of torch, methods in older ones.
        spelling, owner = (_called(getattr(found.source, x)) for x in ("name", "guard_source"))
        # Dynamo passes floats as tensors that it makes anew for each call.
        is_own = isinstance(node.meta["example_value"], torch.Tensor) and found.is_tensor
        return cls(spelling, is_own and "NN_MODULE" in owner.name)


def _called(value: Any) -> Any:
    return value() if callable(value) else value


# Capture ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Captured:
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


def _capture(gm: GraphModule) -> _Captured:
    origins = [_Origin.of(node) for node in gm.graph.nodes if node.op == "placeholder"]
    names = _Names.of_modules_in(origin.spelling for origin in origins if origin.is_stored)
    graph = _to_aten(gm)
    _clean(graph, names)
    placeholders = dict(enumerate(node for node in graph.nodes if node.op == "placeholder"))
    _read_sizes(graph, placeholders.values())
    unread = [at for at, node in placeholders.items() if not node.users]
    for at in unread:
        graph.erase_node(placeholders.pop(at))
    frozen = [at for at in placeholders if origins[at].is_stored]
    stored = _distinct({at: names.name(origins[at].spelling) for at in frozen})
    read_stored(graph, {placeholders[at]: name for at, name in stored.items()})
    inputs = [at for at in placeholders if at not in stored]
    called = _distinct({at: _parts(origins[at].spelling)[-1] for at in inputs})
    specs = tuple(_spec(called[at], placeholders[at]) for at in inputs)
    output: Any = graph.output_node().args[0]
    signature = Signature(
        parameters=tuple(spec.name for spec in specs),
        defaults={},
        inputs=specs,
        constants={},
        output=pytree.tree_structure(tuple(object() for _ in output)),
    )
    return _Captured(graph, signature, stored, tuple(inputs))


def _to_aten(gm: GraphModule) -> Graph:
    """Trace dynamo's graph of torch calls to aten calls, composite ones left whole."""
    values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))

    def run(*args: Any) -> Any:
        return Interpreter(gm).run(*args, enable_io_processing=False)

    # In the mode that dynamo used, sizes keep the symbols that dynamo guards on.
    try:
        with torch.no_grad(), next(modes), fx_traceback.preserve_node_meta():
            return make_fx(run, pre_dispatch=True)(*values).graph
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"dynamo's graph cannot be traced to aten: {first}") from error


# They steer how torch records calls; what they brought about (casts, for one) is in the trace.
_STEERING = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def _clean(graph: Graph, names: _Names) -> None:
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


def _read_sizes(graph: Graph, placeholders: Iterable[Node]) -> None:
    """Let the sizes that dynamo passes beside the tensors be read off the tensors."""
    nodes = list(placeholders)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    sizes = {
        size.node.expr: (node, dim)
        for node in nodes
        if match.is_tensor(node)
        for dim, size in enumerate(match.shape(node))
        if isinstance(size, torch.SymInt)
    }
    for node in nodes:
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt) or value.node.expr not in sizes:
            continue
        with graph.inserting_before(first):
            read = graph.call_function(aten.sym_size.int, sizes[value.node.expr])
        read.meta["val"] = value
        node.replace_all_uses_with(read)


def _spec(name: str, node: Node) -> InputSpec:
    if not match.is_tensor(node):
        return InputSpec(name, (), torch.int64)
    sizes = tuple(size if isinstance(size, int) else None for size in match.shape(node))
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


# Run ----------------------------------------------------------------------------------------------


class _Frozen:
    """Runs a captured graph with its weights in 8 bits, one set for each set that it is given.

    Dynamo takes weights for inputs: two blocks of the same shape may share one graph, and a weight
    may change between calls. So every call is checked against the weights that were quantized.
    """

    def __init__(self, captured: _Captured, choice: _Choice, args: Sequence[Any]) -> None:
        self._captured = captured
        self._choice = choice
        self._versions = [_Version.of(self._stored(args), self._compile(args))]

    def __call__(self, *args: Any) -> Any:
        """Run on one call's arguments, weights included, as dynamo passes them."""
        module = self._module(args)
        with _as_traced(args):
            return module(*(args[at] for at in self._captured.inputs))

    def _stored(self, args: Sequence[Any]) -> list[torch.Tensor]:
        return [args[at] for at in self._captured.stored]

    def _module(self, args: Sequence[Any]) -> GraphModule:
        weights = self._stored(args)
        for version in self._versions:
            if version.is_of(weights):
                return version.module
        log.info("other weights than those that were quantized: quantizing them")
        self._versions = [one for one in self._versions if one.may_be_asked_for(weights)]
        self._versions.append(_Version.of(weights, self._compile(args)))
        return self._versions[-1].module

    def _compile(self, args: Sequence[Any]) -> GraphModule:
        choice = self._choice
        call = self._captured.call(args)
        has_numbers = any(not isinstance(value, torch.Tensor) for value in call.values())
        probe = None if has_numbers else pipeline.Probe(call)
        with _as_traced(args):
            program = pipeline.run(self._captured.program(args), passes.NORMALIZE, probe=probe)
            choice.recipe.check(program.groups)
            before = program.nbytes
            program = pipeline.run(
                program, passes.smoothing(choice.recipe, choice.stats), probe=probe
            )
            program = pipeline.run(program, passes.quantization(choice.recipe, choice.stats))
            program = pipeline.run(program, passes.lowering(_device(args)))
        log.info(
            "compiled a graph of %d groups: weights %.1f MB -> %.1f MB",
            len(program.groups),
            before / 1e6,
            program.nbytes / 1e6,
        )
        return program.module


@dataclass(frozen=True)
class _Version:
    """A module, and the weights that it holds in 8 bits: which tensors, and torch's change counts.

    Weights are held weakly: freeing the model frees its weights.
    """

    weights: tuple[weakref.ref[torch.Tensor], ...]
    counts: tuple[int, ...]
    module: GraphModule

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], module: GraphModule) -> _Version:
        return cls(tuple(map(weakref.ref, weights)), tuple(map(_changes, weights)), module)

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        return self._names(weights) and self.counts == tuple(map(_changes, weights))

    def may_be_asked_for(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether this can be of use again: not if `weights` are its own, changed, or some died."""
        return not self._names(weights) and all(one() is not None for one in self.weights)

    def _names(self, weights: Sequence[torch.Tensor]) -> bool:
        return all(mine() is one for mine, one in zip(self.weights, weights, strict=True))


def _changes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _as_traced(args: Iterable[Any]) -> Iterator[None]:
    """Neither record gradients nor cast: the casts of autocast are in the graph already."""
    with torch.no_grad(), torch.autocast(_device(args).type, enabled=False):
        yield


def _device(args: Iterable[Any]) -> torch.device:
    return next(value.device for value in args if isinstance(value, torch.Tensor))
