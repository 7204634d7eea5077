"""Program: a graph at a level, the tensors it reads, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from wancompile.ir import edit, match, text
from wancompile.ir.levels import Level, verify
from wancompile.ir.site import Attention, Group, Site, Ungrouped
from wancompile.signature import Signature

# The node, its positional operands and its result. GraphModule keeps its own copy of the graph, so
# the node is one of that copy: sites and module paths travel in its meta.
Watch = Callable[[Node, tuple[Any, ...], Any], None]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one program, how long it took, and how exact it was.

    `identity` is the pass with its options, `level` what it gave. `error` is the relative L2
    difference of the program's output before and after, where the runner was asked to measure it;
    None elsewhere.
    """

    name: str
    identity: str
    level: Level
    seconds: float
    nodes_before: int
    nodes_after: int
    done: tuple[edit.Note, ...] = ()
    skipped: tuple[edit.Note, ...] = ()
    error: float | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A graph that runs, at one level of the compiler.

    Invariants: `graph` reads stored tensors by their qualified name in `state` and takes the inputs
    of `signature` in order; it is never edited once the program exists (passes edit a `draft`); it
    runs at every level, so two levels of a model can be compared output by output.
    """

    graph: Graph
    state: dict[str, torch.Tensor]
    level: Level
    signature: Signature
    groups: tuple[Group, ...] = ()
    ungrouped: tuple[Ungrouped, ...] = ()
    attentions: tuple[Attention, ...] = ()
    records: tuple[PassRecord, ...] = field(default=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; arguments are those of the traced model's forward."""
        with torch.no_grad():
            return self.signature.unflatten(self.module(*self.signature.bind(args, kwargs)))

    @cached_property
    def module(self) -> GraphModule:
        """The graph as a module whose buffers are the tensors of `state`.

        The module has its own copy of the graph: a graph holds on to its module, and with it to
        every weight.
        """
        return GraphModule(nest(self.state), edit.copy_graph(self.graph))

    def draft(self, *, consume: bool = False) -> edit.Draft:
        """Return a private working copy; weights are shared, the graph is not.

        With `consume` the draft is the only holder of the weights and this program cannot run any
        more: that is how quantization frees each weight as soon as it has its 8 bits.
        """
        state = dict(self.state)
        if consume:
            self.release()
        return edit.Draft(
            edit.copy_graph(self.graph),
            state,
            self.groups,
            self.ungrouped,
            self.attentions,
            self.signature,
        )

    def release(self) -> None:
        """Let go of the weights; the program cannot run any more.

        torch ties a GraphModule and its graph in a cycle, which would keep the buffers until the
        garbage collector comes by, so they are taken out of it.
        """
        self.state.clear()
        module = self.__dict__.pop("module", None)
        if module is not None:
            for part in module.modules():
                part._buffers.clear()

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next((one.device for one in self.state.values()), torch.device("cpu"))

    def to(self, device: torch.device) -> Program:
        """Return the program on `device`."""
        draft = self.draft()
        edit.move(draft, device)
        return replace(self, graph=draft.graph, state=draft.state)

    def advance(self, draft: edit.Draft, level: Level, record: PassRecord) -> Program:
        """Return the program that `draft` has become."""
        return replace(
            self,
            graph=draft.graph,
            state=draft.state,
            level=level,
            signature=draft.signature or self.signature,
            groups=draft.groups,
            ungrouped=draft.ungrouped,
            attentions=draft.attentions,
            records=(*self.records, record),
        )

    def verify(self, pass_name: str | None = None) -> None:
        """Raise `LevelError` unless the program keeps the invariants of its level."""
        self.graph.lint()
        verify(
            self.graph,
            self.level,
            groups=self.groups,
            ungrouped=self.ungrouped,
            state=self.state,
            inputs=self.signature.inputs,
            pass_name=pass_name,
        )

    @property
    def walked(self) -> Graph:
        """The graph whose nodes `watched` shows."""
        return self.module.graph

    def watched(self, watch: Watch, *args: Any, **kwargs: Any) -> Any:
        """Run the program as a call does, and show `watch` each node, its operands and its result.

        Values are let go after their last reader, as in any run: what `watch` wants it must keep.
        """
        with torch.no_grad():
            leaves = _Watched(self.module, watch).run(*self.signature.bind(args, kwargs))
            return self.signature.unflatten(leaves)

    def values(self, sites: Iterable[Site], *args: Any, **kwargs: Any) -> dict[Site, torch.Tensor]:
        """Run the program and return the outputs of the calls at `sites`."""
        wanted, found = frozenset(sites), {}

        def keep(node: Node, operands: tuple[Any, ...], result: Any) -> None:
            del operands
            site = match.site(node)
            if site is not None and site in wanted:
                found[site] = result

        self.watched(keep, *args, **kwargs)
        return found

    def print(self, names: str = "fx") -> str:
        """Return the graph as text, one line a node.

        `names` is "fx" for the names in the graph, or "canonical" for such as do not depend on how
        the program was made, by which two can be compared.
        """
        return text.render(self.graph, names=names)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())


class _Watched(Interpreter):
    """Runs a graph node by node and shows every call."""

    def __init__(self, module: GraphModule, watch: Watch) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            operands, _ = self.fetch_args_kwargs_from_env(n)
            self._watch(n, operands, result)
        return result


def nest(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module tree that holds `state` as buffers under their qualified names.

    Plain buffers, not Parameters: a program is for inference, and 8-bit tensors cannot be trained.
    """
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.register_buffer(leaf, tensor.detach())
    return root
