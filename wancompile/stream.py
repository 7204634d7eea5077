"""Run a program on a device that does not hold its weights.

The graph is walked node by node. Each large stored tensor comes to the device before its first
reader and goes after its last; on CUDA the next ones are under way meanwhile. Intermediate values
go after their last reader. What the program writes to, and what is small, stays on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from wancompile.ir import edit
from wancompile.program import Program, Watch

BUDGET = 1 << 30
"""Bytes of weights on the device at a time, unless one node reads more: a block of the largest
model and a half."""

# Below this, a copy costs more than the memory is worth.
_SMALL = 1 << 20
_STAGES, _STAGE_BYTES = 8, 1 << 26


def place(program: Program, device: torch.device | None) -> Program | Stream:
    """Return what runs `program` on `device`: itself if its weights are there, or None is given."""
    if device is None or is_same(device, program.device):
        return program
    return Stream(program, device)


def is_same(one: torch.device, other: torch.device) -> bool:
    """Whether both name one device; without an index it is the current one of its kind."""
    return _indexed(one) == _indexed(other)


def _indexed(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


class Stream:
    """Runs `program` on `device`, with at most `budget` bytes of its large weights there.

    Arguments may be anywhere; results come back to where the first of them was.

    Attributes:
        state: the tensors that stay on the device, those that the program writes to among them.
        peak: the most bytes of large weights that were on the device at once.
    """

    def __init__(self, program: Program, device: torch.device, *, budget: int = BUDGET) -> None:
        self.signature = program.signature
        self._device = device
        graph = edit.copy_graph(program.graph)
        edit.retarget(graph, device)
        self._graph = graph
        self._nodes = list(graph.nodes)
        readers = _readers(self._nodes)
        written = _written(self._nodes)
        stays = {
            name for name in readers if name in written or program.state[name].nbytes <= _SMALL
        }
        self.state = {name: program.state[name].to(device, copy=True) for name in stays}
        moving = {name: steps for name, steps in readers.items() if name not in stays}
        self._weights = _Window(moving, program.state, _loader(device), budget)
        self._dying = _dying(self._nodes)

    @property
    def peak(self) -> int:
        """The most bytes of large weights that were on the device at once."""
        return self._weights.peak

    @property
    def walked(self) -> Graph:
        """The graph whose nodes `watched` shows."""
        return self._graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; arguments are those of the traced model's forward."""
        return self.watched(None, *args, **kwargs)

    def watched(self, watch: Watch | None, *args: Any, **kwargs: Any) -> Any:
        """Run the program and show `watch` every op, its operands and its result."""
        tensors = self.signature.bind(args, kwargs)
        home = tensors[0].device
        inputs = (tensor.to(self._device) for tensor in tensors)
        try:
            with torch.no_grad():
                leaves = self._leaves(inputs, watch)
        finally:
            self._weights.clear()
        return self.signature.unflatten(
            [leaf.to(home) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )

    def _leaves(self, inputs: Iterator[Tensor], watch: Watch | None) -> Any:
        values: dict[Node, Any] = {}

        def value(node: Node) -> Any:
            if node.op != "get_attr":
                return values[node]
            name = str(node.target)
            return self.state[name] if name in self.state else self._weights[name]

        for step, node in enumerate(self._nodes):
            self._weights.before(step)
            if node.op == "output":
                return map_arg(node.args[0], value)
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "call_function":
                target: Any = node.target
                operands: Any = map_arg(node.args, value)
                values[node] = target(*operands, **map_arg(node.kwargs, value))
                if watch is not None:
                    watch(node, operands, values[node])
                del operands  # what is dead goes before the next op, not after it
            self._weights.after(step)
            for dead in self._dying.get(step, ()):
                values.pop(dead, None)
        raise AssertionError("the graph has no output")


def _readers(nodes: list[Node]) -> dict[str, list[int]]:
    """Return the steps that read each stored tensor or a view of it, in order."""
    found: dict[str, list[int]] = {}
    views: dict[Node, set[str]] = {}
    for step, node in enumerate(nodes):
        if node.op == "get_attr":
            views[node] = {str(node.target)}
            continue
        names = {name for parent in node.all_input_nodes for name in views.get(parent, ())}
        for name in names:
            found.setdefault(name, []).append(step)
        if names and _may_view(node):
            views[node] = names
    return found


def _may_view(node: Node) -> bool:
    """Whether the result may share the memory of an operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(one.alias_info is not None for one in schema.returns)


def _written(nodes: list[Node]) -> set[str]:
    """Return the names of the stored tensors that calls write to."""
    found: set[str] = set()
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for given, argument in zip(node.args, schema.arguments, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(given, Node) and given.op == "get_attr":
                found.add(str(given.target))
    return found


def _dying(nodes: list[Node]) -> dict[int, list[Node]]:
    """Return, by step, the values that nothing reads after it."""
    last: dict[Node, int] = {}
    for step, node in enumerate(nodes):
        last[node] = step
        last.update(dict.fromkeys(node.all_input_nodes, step))
    found: dict[int, list[Node]] = {}
    for node, step in last.items():
        found.setdefault(step, []).append(node)
    return found


# Weights on their way ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coming:
    """A tensor that is on the device once `wait` has been called before its reader."""

    tensor: Tensor
    wait: Callable[[], None]


Loader = Callable[[Tensor], _Coming]


class _Window:
    """The weights that are on the device, by name: a window that moves over the graph.

    `steps` gives, for each name, the steps that read it.
    """

    def __init__(
        self,
        steps: Mapping[str, list[int]],
        state: Mapping[str, Tensor],
        load: Loader,
        budget: int,
    ) -> None:
        self.peak = 0
        self._order = sorted((reads[0], name) for name, reads in steps.items())
        self._last: dict[int, list[str]] = {}
        for name, reads in steps.items():
            self._last.setdefault(reads[-1], []).append(name)
        self._host = state
        self._load = load
        self._budget = budget
        self._here: dict[str, _Coming] = {}
        self._bytes = 0
        self._queue: deque[tuple[int, str]] = deque()
        self.clear()

    def __getitem__(self, name: str) -> Tensor:
        coming = self._here[name]
        coming.wait()
        return coming.tensor

    def before(self, step: int) -> None:
        """Fetch what `step` reads first, and what comes next as far as the budget goes."""
        while self._queue and (self._queue[0][0] <= step or self._fits(self._queue[0][1])):
            _, name = self._queue.popleft()
            self._here[name] = self._load(self._host[name])
            self._bytes += self._host[name].nbytes
            self.peak = max(self.peak, self._bytes)

    def after(self, step: int) -> None:
        """Let go of what `step` reads last."""
        for name in self._last.get(step, ()):
            del self._here[name]
            self._bytes -= self._host[name].nbytes

    def clear(self) -> None:
        """Begin again: nothing is on the device."""
        for coming in self._here.values():
            coming.wait()  # what is still on its way must not arrive in memory of something else
        self._here.clear()
        self._bytes = 0
        self._queue = deque(self._order)

    def _fits(self, name: str) -> bool:
        return self._bytes + self._host[name].nbytes <= self._budget


def _loader(device: torch.device) -> Loader:
    if device.type == "cuda":
        return _Staged(device)
    return lambda tensor: _Coming(tensor.to(device), lambda: None)


class _Staged:
    """Copies to a GPU on a stream of its own, through page-locked buffers that are used in turn.

    The memory for a weight is taken and given back in the order of the computation, whose stream
    it belongs to; so the copy waits for what is computed when it is asked for, and memory never
    grows however far the host is ahead. The host waits where all buffers are still on their way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, tensor: Tensor) -> _Coming:
        computing = torch.cuda.current_stream(self._device)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        self._copies.wait_stream(computing)
        with torch.cuda.stream(self._copies):
            if tensor.is_pinned() and tensor.is_contiguous():
                target.copy_(tensor, non_blocking=True)
            else:
                self._copy(_raw(target), _raw(tensor.contiguous()))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._copies)
        return _Coming(target, lambda: computing.wait_event(done))

    def _copy(self, target: Tensor, source: Tensor) -> None:
        pieces = (torch.split(one, _STAGE_BYTES) for one in (target, source))
        for there, here in zip(*pieces, strict=True):
            stage, sent = self._stage()
            sent.synchronize()
            stage = stage[: len(here)]
            stage.copy_(here)
            there.copy_(stage, non_blocking=True)
            sent.record(self._copies)

    def _stage(self) -> tuple[Tensor, torch.cuda.Event]:
        """Return the buffer used longest ago and the event after its last copy."""
        if len(self._free) < _STAGES:
            buffer = torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._free.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
            return self._free[-1]
        self._free.rotate(-1)
        return self._free[-1]


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
