"""What each site costs in each type, from measured kernel times.

A table holds, for each kind of work and each shape that was measured, how much of that work a
millisecond does, in 1e9: FLOPs of products and of attention (so that a rate is in TFLOP/s), and
elements of passes over memory. At other shapes the rate is a mean of the measured ones, weighed by
their distance in the logarithms of the sizes, so that a measured shape has its own rate and others
that of their neighbours. Models much smaller than those measured run slower than that.
Attention in fp8 was measured with FlashAttention-3, in int8 with our own kernel. Kinds of attention
have the names of `ATTENTIONS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.fx import Node

from wancompile.errors import InputError
from wancompile.ir import match
from wancompile.ir.site import Attention, Group, Site, Source
from wancompile.passes.quantize_attention import obstacle
from wancompile.program import Program
from wancompile.recipe import ATTENTIONS, DTYPES, LINEARS, AttentionSpec, Recipe

FLOAT = "float"
OPTIONS = (FLOAT, *LINEARS)
"""What a group can be in."""
ATTENTION_OPTIONS = (FLOAT, *ATTENTIONS)
"""What a self-attention can be in."""

TABLES: Mapping[str, Path] = {"h100": Path(__file__).with_name("cost_h100.json")}
"""The files of measured rates, by device; `benchmarks/cost_table.py` writes them."""

Shape = tuple[int, ...]

# Bytes an element of what a group in floating point reads, in passes of torch that are not fused:
# a cast to fp32, the norm, gain and shift in fp32, a cast back, and the residual before it.
_MODULATED_NORM_BYTES = (2 + 4) + (4 + 4) + (4 + 4) + (4 + 4) + (4 + 2) + (2 + 2 + 2)
_AFFINE_NORM_BYTES = (2 + 4) + (4 + 4) + (4 + 2) + (2 + 2 + 2)
_GELU_BYTES = 2 + 2
_BYTES = {
    Source.MODULATED_NORM: _MODULATED_NORM_BYTES,
    Source.AFFINE_NORM: _AFFINE_NORM_BYTES,
    Source.ACTIVATION: _GELU_BYTES,
}
# One pass of RMSNorm reads and writes bf16: its rate stands for that of any pass.
_RMS_NORM_BYTES = 2 + 2
# Behind a static scale GELU is computed in the epilogue of the product before it. By the
# instructions that this adds to the epilogue it takes half as long as the pass that is saved.
_EPILOGUE = 0.5
_PASSES = {
    Source.MODULATED_NORM: "norm_quantize",
    Source.AFFINE_NORM: "norm_quantize",
    Source.ACTIVATION: "gelu_quantize",
}


@dataclass(frozen=True)
class Table:
    """Measured rates of one device.

    `rates[kind]` holds `(shape, rate)`: how much a millisecond does at that shape, in 1e9. `source`
    names the file of measurements that it was made from.
    """

    device: str
    source: str
    rates: Mapping[str, tuple[tuple[Shape, float], ...]]

    def ms(self, kind: str, shape: Shape, work: float) -> float:
        """Return the milliseconds that `work` of a kind takes at a shape.

        Raises:
            InputError: nothing of this kind was measured.
        """
        measured = self.rates.get(kind)
        if not measured:
            raise InputError(f"{self.device}: no {kind} was measured ({self.source})")
        return work / 1e9 / _rate(measured, shape) if work else 0.0


def load(device: str) -> Table:
    """Return the table of a device.

    Raises:
        InputError: there is none.
    """
    if device not in TABLES:
        raise InputError(f"no times were measured on {device!r}; there are {', '.join(TABLES)}")
    return _load(TABLES[device])


@cache
def _load(path: Path) -> Table:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rates = {
        kind: tuple((tuple(shape), float(rate)) for shape, rate in found)
        for kind, found in data["rates"].items()
    }
    return Table(data["device"], data["source"], rates)


def _rate(measured: Sequence[tuple[Shape, float]], shape: Shape) -> float:
    """Interpolate in the logarithms of sizes and rates (Shepard 1968, power 2)."""
    total = weighed = 0.0
    for other, rate in measured:
        distance = sum(math.log(a / b) ** 2 for a, b in zip(shape, other, strict=True))
        if distance < 1e-12:
            return rate
        total += 1 / distance
        weighed += math.log(rate) / distance
    return math.exp(weighed / total)


@dataclass(frozen=True)
class SiteCost:
    """What one group or self-attention takes: `ms` by option, one call of the model.

    `site` is the key of the group or the site of the attention; `role` as in reports.
    """

    site: Site
    role: str
    ms: Mapping[str, float]


@dataclass(frozen=True)
class Costs:
    """The times of one call of a model, the part that is no block left out.

    `fixed` is what no choice changes: cross-attention and the norms of its queries. `compiled` is
    the same model in bf16 under torch.compile, with cuDNN's attention, for comparison.
    """

    sites: tuple[SiteCost, ...]
    fixed: float
    compiled: float
    tokens: int
    source: str

    def of(self, recipe: Recipe, groups: Sequence[Group]) -> float:
        """Return the milliseconds of one call under `recipe`."""
        options = self.options(recipe, groups)
        return self.fixed + sum(one.ms[name] for one, name in zip(self.sites, options, strict=True))

    def options(self, recipe: Recipe, groups: Sequence[Group]) -> list[str]:
        """Return what each of `sites` is in under `recipe`."""
        specs = {group.key: recipe.spec_for(group) for group in groups}
        found = []
        for one in self.sites:
            if one.site in specs:
                spec = specs[one.site]
                found.append(spec.name if spec else FLOAT)
            else:
                attention = recipe.attention_for(one.site)
                found.append(attention.name if attention else FLOAT)
        return found


def costs(program: Program, *, tokens: int | None = None, device: str = "h100") -> Costs:
    """Return what every group and self-attention of a NORMAL program takes in each type.

    Args:
        program: at level NORMAL, traced dynamically or not.
        tokens: video tokens of one call; those it was traced at if not given.
        device: the name of a table.

    Raises:
        InputError: there is no table of the device, or no self-attention in the program.
    """
    table, sizes = load(device), _Sizes.of(program, tokens)
    nodes = match.by_site(program.graph)
    sites = [_group(group, nodes, sizes, table) for group in program.groups]
    fixed = 0.0
    for attention in program.attentions:
        node = nodes[attention.site]
        if obstacle(attention, node):
            fixed += _cross_attention(attention, nodes, sizes, table)
        else:
            sites.append(_self_attention(attention, node, sizes, table))
    return Costs(
        sites=tuple(sites),
        fixed=fixed,
        compiled=_compiled(program, nodes, sizes, table),
        tokens=sizes.tokens,
        source=f"{table.device}, {table.source}",
    )


@dataclass(frozen=True)
class _Sizes:
    """What the symbolic sizes of a program are in one call."""

    video: Any
    tokens: int

    @classmethod
    def of(cls, program: Program, tokens: int | None) -> _Sizes:
        nodes = match.by_site(program.graph)
        own = [one for one in program.attentions if one.is_self]
        if not own:
            raise InputError("the program has no self-attention, by which its tokens are counted")
        video = match.shape(match.args(nodes[own[0].site])[0])[2]
        return cls(video, tokens or _hint(video))

    def rows(self, node: Node) -> int:
        """Return how many rows `node` yields for each video."""
        size = match.shape(node)[-2]
        return self.tokens if match.same(size, self.video) else _hint(size)


def _hint(size: Any) -> int:
    """Return a size, that of the call it was traced with where it is open."""
    return size if isinstance(size, int) else int(size.node.hint)


def _group(group: Group, nodes: Mapping[Site, Node], sizes: _Sizes, table: Table) -> SiteCost:
    members = [nodes[site] for site in group.sites]
    x = match.args(members[0])[0]
    m, k = sizes.rows(x), int(match.shape(x)[-1])
    widths = [int(match.shape(node)[-1]) for node in members]
    elements = m * k
    ms_of_passes = _torch_passes(elements * _BYTES.get(group.source, 0), (m, k), table)
    ms = {FLOAT: ms_of_passes}
    for n in widths:
        ms[FLOAT] += table.ms("linear bf16", (m, k, n), 2 * n * elements)
    for dtype in DTYPES:
        one_pass = f"{_PASSES.get(group.source, 'quantize_per_token')} {dtype}"
        product = table.ms(f"linear {dtype}", (m, k, sum(widths)), 2 * sum(widths) * elements)
        pass_ms = table.ms(one_pass, (m, k), elements)
        ms[dtype] = product + pass_ms
        if group.source is Source.ACTIVATION:
            ms[f"{dtype}-static"] = product + _EPILOGUE * pass_ms
        else:  # nothing is fused with a rounding that knows its scale, for nothing is won by it
            rounding = table.ms(f"quantize_per_token {dtype}", (m, k), elements)
            ms[f"{dtype}-static"] = product + ms_of_passes + rounding
    return SiteCost(group.key, str(group.role), ms)


def _self_attention(attention: Attention, node: Node, sizes: _Sizes, table: Table) -> SiteCost:
    _, heads, _, width = match.shape(node)
    shape = (int(heads), sizes.tokens, sizes.tokens, int(width))
    channels = int(heads) * int(width)
    elements = 2 * sizes.tokens * channels  # of q and k
    work = 4 * math.prod(shape)
    ms = {}
    for option in ATTENTION_OPTIONS:
        spec = ATTENTIONS.get(option)
        ms[option] = table.ms(f"attention {option if spec else 'bf16'}", shape, work)
        for rotation in _rotations(spec, table):
            ms[option] += table.ms(rotation, (sizes.tokens, channels), elements / 2)
    return SiteCost(attention.site, "self-attention", ms)


def _rotations(spec: AttentionSpec | None, table: Table) -> tuple[str, str]:
    """Return the passes that norm and rotate q and k."""
    if spec is None:
        return "norm_rotate float", "norm_rotate float"
    per_head = f"norm_rotate_quantize {spec.dtype}"
    per_token = f"norm_rotate_quantize_per_token {spec.dtype}"
    # Tables from before that pass was there have none.
    is_known = spec.scales_queries and per_token in table.rates
    return per_token if is_known else per_head, per_head


def _cross_attention(
    attention: Attention, nodes: Mapping[Site, Node], sizes: _Sizes, table: Table
) -> float:
    q, k = match.args(nodes[attention.site])[:2]
    _, heads, _, width = match.shape(q)
    shape = (int(heads), sizes.rows(q), sizes.rows(k), int(width))
    passes = (sizes.rows(q), int(heads) * int(width))
    return table.ms("attention bf16", shape, 4 * math.prod(shape)) + table.ms(
        "rms_norm", passes, math.prod(passes)
    )


def _torch_passes(moved: float, shape: Shape, table: Table) -> float:
    """Return the time of torch's own passes over `moved` bytes."""
    return table.ms("rms_norm", shape, moved / _RMS_NORM_BYTES)


def _compiled(program: Program, nodes: Mapping[Site, Node], sizes: _Sizes, table: Table) -> float:
    total = 0.0
    for group in program.groups:
        for node in (nodes[site] for site in group.sites):
            m, n = sizes.rows(node), int(match.shape(node)[-1])
            k = int(match.shape(match.args(node)[0])[-1])
            total += table.ms("linear bf16", (m, k, n), 2 * m * k * n)
    for attention in program.attentions:
        q, k = match.args(nodes[attention.site])[:2]
        heads, width = int(match.shape(q)[1]), int(match.shape(q)[3])
        shape = (heads, sizes.rows(q), sizes.rows(k), width)
        total += table.ms("attention bf16", shape, 4 * math.prod(shape))
        if attention.is_self:
            passes = (sizes.tokens, heads * width)
            total += table.ms("compiled passes", passes, math.prod(passes))
    return total
