"""Printing graphs: a stable text, one line a node, and diffs of two of them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from wancompile.ir import match

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


class _Sizes:
    """Names symbolic sizes d0, d1, ... in order of appearance, whatever torch called them."""

    def __init__(self) -> None:
        self._symbols: dict[Any, Any] = {}
        self._texts: dict[Any, str] = {}

    def __call__(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expr = size.node.expr
        if expr not in self._texts:
            for symbol in sorted(expr.free_symbols - self._symbols.keys(), key=str):
                name = f"d{len(self._symbols)}"
                self._symbols[symbol] = symbol.func(name, integer=True, positive=True)
            # Renamed before it is printed: sympy orders factors and terms by the names of symbols.
            self._texts[expr] = str(expr.xreplace(self._symbols)).replace(" ", "")
        return self._texts[expr]


class _Names:
    """Numbers nodes per op in order of appearance, so that text does not depend on history."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._given: dict[Node, str] = {}

    def __call__(self, node: Node) -> str:
        if node not in self._given:
            base = node.name if node.op == "placeholder" else _short(node)
            self._given[node] = base if node.op == "placeholder" else self._number(base)
        return self._given[node]

    def _number(self, base: str) -> str:
        self._counts[base] += 1
        return f"{base}{self._counts[base] - 1}"


def render(graph: Graph, *, names: str = "canonical") -> str:
    """Return `graph` as text.

    `names="canonical"` numbers values by op and position, for golden files; `names="fx"` keeps the
    names the nodes carry through the passes, for diffs.
    """
    name: Callable[[Node], str] = _Names() if names == "canonical" else (lambda node: node.name)
    sizes = _Sizes()
    lines = [_line(node, name, sizes) for node in graph.nodes if node.op != "get_attr"]
    return "\n".join(lines) + "\n"


def diff(before: str, after: str, *, context: int = 2) -> str:
    """Return a unified diff of two rendered graphs."""
    return "\n".join(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=context
        )
    )


def op_counts(graph: Graph) -> dict[str, int]:
    """Return how often each op is called, by short name, sorted by name."""
    counts = Counter(_short(node) for node in graph.nodes if node.op == "call_function")
    return dict(sorted(counts.items()))


def _line(node: Node, name: Callable[[Node], str], sizes: _Sizes) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0], name, sizes)}"
    head = f"%{name(node)}: {_type(node.meta.get('val'), sizes)}"
    if node.op == "placeholder":
        return f"{head} = input"
    args = [_value(arg, name, sizes) for arg in node.args]
    args += [f"{key}={_value(arg, name, sizes)}" for key, arg in node.kwargs.items()]
    site = match.site(node)
    return f"{head} = {_short(node)}({', '.join(args)})" + (f"  # {site}" if site else "")


def _short(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    return str(getattr(target, "__name__", target))


def _type(value: Any, sizes: _Sizes) -> str:
    if isinstance(value, torch.Tensor):
        dims = ", ".join(sizes(size) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{dims}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_type(item, sizes) for item in value)})"
    if isinstance(value, (torch.SymInt, int)):
        return "size"
    return type(value).__name__


def _value(value: Any, name: Callable[[Node], str], sizes: _Sizes) -> str:
    if isinstance(value, Node):
        return str(value.target) if value.op == "get_attr" else f"%{name(value)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, name, sizes) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return repr(value)
