"""Where the time of one forward goes: by node of our graphs, by kernel of the others."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from wancompile.compiled import CompiledModel

LINEARS, ATTENTION, ELEMENTWISE = "linears", "attention", "elementwise"
PARTS = (LINEARS, ATTENTION, ELEMENTWISE)

_ATTENTION_KERNELS = ("flash", "fmha", "sdpa", "attn", "attention", "quant_per_block")
_LINEAR_KERNELS = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "gemv", "splitk")
_ATTENTION_OPS = ("attention",)
_LINEAR_OPS = ("linear", "addmm", "mm", "matmul", "bmm", "conv")
# Operands with a row per token, of which an op with an argument `rows` reads only those rows.
_ROW_OPERANDS = ("gate", "weight", "bias")
_ADDED = ("calls", "ms", "gbytes", "tflop")
_SHORT = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
# Cycles for which the GPU is kept busy until the work to be timed is in its queue.
_HEAD_START = 400_000_000


@dataclass(frozen=True)
class Entry:
    """Calls of one op on one set of shapes, or of one kernel, in one layer or one forward.

    `kind` is the type of number that its products take, "bf16", "fp8" or "int8".
    """

    op: str
    shapes: str
    part: str
    kind: str
    calls: float
    ms: float
    gbytes: float = 0.0
    tflop: float = 0.0


def per_layer(deep: Iterable[Entry], shallow: Iterable[Entry], layers: int) -> list[dict[str, Any]]:
    """Return what the deeper model does more, divided by the number of `layers` that it has more.

    Entries are matched by op and shapes. What only the shallow model does counts negatively, so
    that sums over parts are right even where a kernel has another name in the deeper one.
    """
    after = {(entry.op, entry.shapes): entry for entry in deep}
    before = {(entry.op, entry.shapes): entry for entry in shallow}
    found = []
    for key, entry in {**before, **after}.items():
        values = {
            name: (_value(after.get(key), name) - _value(before.get(key), name)) / layers
            for name in _ADDED
        }
        if values["calls"]:
            found.append({**asdict(entry), **values})
    return sorted(found, key=lambda one: -one["ms"])


def _value(entry: Entry | None, name: str) -> float:
    return 0.0 if entry is None else float(getattr(entry, name))


# ---------------------------------------------------------------- nodes


def node_entries(
    model: CompiledModel, call: Mapping[str, Any], device: torch.device, repeats: int
) -> list[Entry]:
    """Return the time of each op of the lowered program, medians of `repeats` runs."""
    tensors = model.program.signature.bind((), call)
    timer = _NodeTimer(model.program.module, device)
    for _ in range(repeats + 1):  # the first warms up
        timer.run_timed(tensors)
    return _grouped(timer.entries())


class _NodeTimer(Interpreter):
    """Runs a graph node by node with a mark before and after each."""

    def __init__(self, module: Any, device: torch.device) -> None:
        super().__init__(module)
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._runs: list[dict[str, float]] = []
        self._entries: dict[str, Entry] = {}

    def run_timed(self, tensors: Sequence[Tensor]) -> None:
        self._marks.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.run(*tensors)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._runs.append({name: _ms(begin, end) for name, begin, end in self._marks})

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        if not isinstance(n.meta.get("val"), (Tensor, tuple, list)):
            return super().run_node(n)  # a size, not work
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        begin = self._mark()
        out = self.call_function(n.target, args, kwargs)
        end = self._mark()
        self._marks.append((n.name, begin, end))
        if n.name not in self._entries:
            self._entries[n.name] = entry_of(n.target, args, kwargs, out)
        return out

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def entries(self) -> list[Entry]:
        """Return one entry for each node, with the median over all runs but the first."""
        return [
            Entry(**{**asdict(entry), "ms": statistics.median(run[name] for run in self._runs[1:])})
            for name, entry in self._entries.items()
        ]


def _ms(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))


def _grouped(entries: Iterable[Entry]) -> list[Entry]:
    """Add up entries of the same op on the same shapes."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        key = entry.op, entry.shapes
        old = found.get(key)
        found[key] = entry if old is None else _sum(old, entry)
    return list(found.values())


def _sum(a: Entry, b: Entry) -> Entry:
    sums = {name: getattr(a, name) + getattr(b, name) for name in _ADDED}
    return Entry(**{**asdict(a), **sums})


def entry_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Entry:
    """Return one call without its time: what it is, the bytes it must move, its FLOPs."""
    op = str(target.name()).replace("::", ".")
    read, made = _tensors([*args, *kwargs.values()]), _tensors([out])
    is_view = bool(made) and all(_is_alias(one, read) for one in made)
    moved = 0 if is_view else bytes_of(target, args, kwargs) + sum(map(_bytes, _unique(made)))
    part = part_of_op(op)
    return Entry(
        op=op,
        shapes=_shapes(read, made),
        part=part,
        kind=_SHORT.get(read[0].dtype, "") if read else "",
        calls=1.0,
        ms=0.0,
        gbytes=moved / 1e9,
        tflop=0.0 if is_view else flops_of(part, read, made) / 1e12,
    )


def part_of_op(op: str) -> str:
    """Return which part of a layer an op belongs to, by its name."""
    name = op.split(".", 1)[1]
    if any(word in name for word in _ATTENTION_OPS):
        return ATTENTION
    is_product = "linear" in name or any(name.split(".")[0] == word for word in _LINEAR_OPS)
    return LINEARS if is_product or "conv" in name else ELEMENTWISE


def flops_of(part: str, read: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """FLOPs of the products of one call, 0 where there are none.

    A linear is 2 * outputs * K, with x `[..., K]` its first argument; convolutions, which no layer
    has, are not counted. Attention is 4 * B * H * Sq * Sk * D, with q `[B, H, Sq, D]` and k of as
    many elements a token as q its first two.
    """
    if part == LINEARS and read[0].dim() < 5:
        return 2 * made[0].numel() * read[0].shape[-1]
    if part == ATTENTION and len(read) >= 3 and read[0].dim() == 4:
        q, k = read[:2]
        queries = q.shape[-2]
        return 4 * q.numel() * (k.numel() * queries // q.numel())
    return 0


def bytes_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes that a call must read: every element of its tensors once.

    Elements that a broadcast repeats count once. Where an argument is called `rows`, of operands
    with a row per token only the rows that it names count.
    """
    names = [one.name for one in target._schema.arguments]
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    rows = named.get("rows")
    by_rows: list[Tensor] = [
        value
        for name, value in named.items()
        if isinstance(value, Tensor) and isinstance(rows, Tensor) and name in _ROW_OPERANDS
    ]
    partly = {id(value) for value in by_rows}
    fully = [one for one in _unique(_tensors([*named.values()])) if id(one) not in partly]
    some = [min(_bytes(one), _row_bytes(one, rows)) for one in _unique(by_rows)]
    return sum(map(_bytes, fully)) + sum(some)


def _row_bytes(value: Tensor, rows: Any) -> int:
    return int(torch.unique(rows).numel()) * value.shape[-1] * value.element_size()


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_alias(one: Tensor, others: Iterable[Tensor]) -> bool:
    return any(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others
    )


def _shapes(read: Sequence[Tensor], made: Sequence[Tensor]) -> str:
    """Return the tensors that matter: those with at least a hundredth of the largest's elements."""
    least = max((tensor.numel() for tensor in (*read, *made)), default=0) / 100

    def text(tensors: Sequence[Tensor]) -> str:
        return ", ".join(
            f"{'x'.join(map(str, one.shape))} {_SHORT.get(one.dtype, str(one.dtype)[6:])}"
            for one in tensors
            if one.numel() >= least
        )

    return f"{text(read)} -> {text(made)}"


# ---------------------------------------------------------------- kernels


def kernel_entries(forward: Callable[[], Any]) -> list[Entry]:
    """Return the CUDA kernels of one forward by name, with the profiler's times."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        forward()
        torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    ms: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            # Inductor numbers its kernels, in deeper models otherwise than in shallow ones.
            name = re.sub(r"_\d+$", "", event.name)
            calls[name] += 1
            ms[name] += event.time_range.elapsed_us() / 1e3
    return [
        Entry(name[:160], "", part_of_kernel(name), "", float(calls[name]), ms[name]) for name in ms
    ]


def part_of_kernel(name: str) -> str:
    """Return which part of a layer a CUDA kernel belongs to, by its name."""
    low = name.lower()
    if low.startswith("triton_"):
        # Inductor names its fused loops after all ops in them; its products are templates.
        return LINEARS if low.startswith("triton_tem") else ELEMENTWISE
    if any(word in low for word in _ATTENTION_KERNELS):
        return ATTENTION
    return LINEARS if any(word in low for word in _LINEAR_KERNELS) else ELEMENTWISE
