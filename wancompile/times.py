"""Where the time of one call goes, part by part: predicted from rates, or measured with a clock.

A part is the groups of one role with the passes over memory that feed them alone, a kind of
attention, or what is left. Predictions hold for the device that the rates were measured on.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from wancompile.cost import FLOAT, Costs
from wancompile.flops import CROSS_ATTENTION, OTHER_LINEAR, SELF_ATTENTION
from wancompile.ir import match
from wancompile.ir.site import Group
from wancompile.program import Program
from wancompile.recipe import DTYPES, Recipe

REST = "everything else"
"""What belongs to no part: residuals, modulations, what several parts read."""

FIXED = f"{CROSS_ATTENTION} and its norms"
"""The part that no recipe changes."""


@dataclass(frozen=True)
class PartTime:
    """The milliseconds of one part: `float_ms` in bf16, `ms` as the recipe has it.

    `sites` counts its groups or attentions, 0 where that is not known.
    """

    part: str
    sites: int
    float_ms: float
    ms: float


@dataclass(frozen=True)
class Predicted:
    """What one call of `tokens` video tokens takes by the rates of `source`, part by part.

    What lies before and behind the blocks is left out. `compiled_ms` is the same in bf16 under
    torch.compile.
    """

    parts: tuple[PartTime, ...]
    compiled_ms: float
    tokens: int
    source: str

    @property
    def ms(self) -> float:
        """The milliseconds of all parts together."""
        return sum(one.ms for one in self.parts)

    @property
    def summary(self) -> str:
        """One sentence on the whole."""
        return (
            f"{as_text(self.ms)} for the blocks of one call of {self.tokens:,} tokens, "
            f"{as_text(self.compiled_ms)} by torch.compile in bf16 "
            f"({self.compiled_ms / max(self.ms, 1e-30):.2f} x); rates from {self.source}"
        )


@dataclass(frozen=True)
class Measured:
    """The median milliseconds of each part over `runs` calls, op by op, on `device`."""

    device: str
    parts: Mapping[str, float]
    runs: int

    @property
    def ms(self) -> float:
        """The milliseconds of all parts together; a call takes less where ops overlap."""
        return sum(self.parts.values())


def as_text(ms: float) -> str:
    """Return a time in s, ms, us or ns with three digits."""
    for unit, size in (("s", 1e3), ("ms", 1.0), ("us", 1e-3)):
        if ms >= 0.9995 * size:
            return f"{ms / size:.3g} {unit}"
    return f"{ms / 1e-6:.3g} ns"


def predict(costs: Costs, recipe: Recipe, groups: Sequence[Group]) -> Predicted:
    """Return what the parts of a model cost under `recipe`; `groups` are those of the `costs`."""
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    sites: Counter[str] = Counter()
    for one, option in zip(costs.sites, costs.options(recipe, groups), strict=True):
        sites[one.role] += 1
        before[one.role] += one.ms[FLOAT]
        after[one.role] += one.ms[option]
    parts = [PartTime(part, sites[part], before[part], after[part]) for part in sites]
    if costs.fixed:
        parts.append(PartTime(FIXED, 0, costs.fixed, costs.fixed))
    return Predicted(tuple(parts), costs.compiled, costs.tokens, costs.source)


def measure(program: Program, call: Mapping[str, Any], *, runs: int = 3) -> Measured:
    """Run `program` op by op, and return what its parts take.

    The first run is not counted. On a GPU the clock is that of the device.

    Args:
        program: at any level, with its weights where it is to run.
        call: named arguments of one call, on the same device.
        runs: how many runs to take the median of.
    """
    device = program.device
    parts = part_of(program, program.walked)
    seen: defaultdict[str, list[float]] = defaultdict(list)
    for run in range(runs + 1):
        clock = _Clock(program.module, device)
        with torch.no_grad():
            clock.run(*program.signature.bind((), dict(call)))
        found: defaultdict[str, float] = defaultdict(float)
        for node, ms in clock.times():
            found[parts[node]] += ms
        for part, ms in found.items():
            if run:
                seen[part].append(ms)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return Measured(name, {part: statistics.median(ms) for part, ms in seen.items()}, runs)


def part_of(program: Program, graph: Graph) -> dict[Node, str]:
    """Return the part of every call in `graph`, that of `program` or its module's copy."""
    named = {str(site): str(group.role) for group in program.groups for site in group.sites}
    for one in program.attentions:
        named[str(one.site)] = SELF_ATTENTION if one.is_self else CROSS_ATTENTION
    # An op that does more than a linear has no site, but still reads its weight.
    weights = {one.data: str(group.role) for group in program.groups for one in group.weights}
    found: dict[Node, str] = {}
    for node in reversed(graph.nodes):
        if node.op == "call_function":
            own = _of_weight(node, weights)
            if own is None and (site := match.site(node)) is not None:
                own = named.get(str(site), OTHER_LINEAR)
            found[node] = own or _of_readers(node, found)
    return found


def _of_weight(node: Node, weights: Mapping[str, str]) -> str | None:
    """Return the role of the 8-bit weight that an op reads."""
    stored = (str(one.target) for one in node.all_input_nodes if one.op == "get_attr")
    return next((weights[name] for name in stored if name in weights), None)


def _of_readers(node: Node, found: Mapping[Node, str]) -> str:
    """Return the part that alone reads `node`, or alone reads its 8-bit codes."""
    users = [user for user in node.users if user in found]
    codes = [user for user in users if _is_code(user)] if not _is_code(node) else []
    parts = {found[user] for user in codes or users}
    return parts.pop() if len(parts) == 1 else REST


def _is_code(node: Node) -> bool:
    """Whether the value is 8-bit codes, taken out of the several that an op returns."""
    value = node.meta.get("val")
    if not match.is_getitem(node) or not isinstance(value, torch.Tensor):
        return False
    return value.dtype in DTYPES.values()


def _cpu() -> str:
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


class _Clock(Interpreter):
    """Runs a graph and takes the time of every call, without waiting for a GPU in between."""

    def __init__(self, module: GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Node, Any, Any]] = []

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        start = self._mark()
        result = super().run_node(n)
        self._marks.append((n, start, self._mark()))
        return result

    def times(self) -> list[tuple[Node, float]]:
        """Return each call with its milliseconds."""
        if not self._on_gpu:
            return [(node, 1000 * (end - start)) for node, start, end in self._marks]
        torch.cuda.synchronize()
        return [(node, start.elapsed_time(end)) for node, start, end in self._marks]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
