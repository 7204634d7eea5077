"""The cost model's table, from measured layers: `python -m benchmarks.cost_table`.

Reads the profiles in the results of `benchmarks.h100`, all runs together, and writes
`wancompile/cost_h100.json`: for each kind of work and each shape that was measured, how much of it
a millisecond does, in 1e9. Ops that pass over memory count under what they serve, so that the kinds
of a layer add up to its ops.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import h100_plan
from benchmarks.record import RESULTS
from wancompile import presets
from wancompile.cost import TABLES

SOURCE = "h100-*.json"
_TEXT_TOKENS = 512
Shape = tuple[int, ...]
# (kind, shape, work, ms) of all calls of an op in one layer.
Done = tuple[str, Shape, float, float]

# The columns that are ours, and what attention is in them.
_COLUMNS = {
    "fp8": "bf16",
    "int8": "bf16",
    "fp8-attention": "fp8",
    "int8-attention": "int8",
    "int8-attention-fast": "int8-fast",
}
_COMPILED = "compile-sdpa"
_TENSOR = re.compile(r"(\d+(?:x\d+)*) (\w+)")
# Ops that serve a norm in 8 bits: the residual before it, where the product does not add it.
_NORM = ("norm_quantize", "residual_norm_quantize", "add_gated")
# The rotation of q and k where attention is in floating point: a dozen ops of torch, or one.
_ROTATION = ("mul.Tensor", "stack", "to.dtype", "add.Tensor", "sub.Tensor", "norm_rotate")


def table(results: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """Return `{kind: [[shape, 1e9 of work per ms], ...]}` of all rows and columns together."""
    work: dict[tuple[str, Shape], float] = defaultdict(float)
    ms: dict[tuple[str, Shape], float] = defaultdict(float)
    for kind, shape, amount, time in _all_done(results):
        work[kind, shape] += amount
        ms[kind, shape] += time
    rates = {key: work[key] / ms[key] / 1e9 for key in work}
    found: dict[str, list[list[Any]]] = defaultdict(list)
    for kind, shape in sorted(rates):
        found[kind].append([list(shape), float(f"{rates[kind, shape]:.4g}")])
    return dict(found)


def _all_done(results: Sequence[Mapping[str, Any]]) -> Iterator[Done]:
    for cell in results:
        row, column = h100_plan.ROWS[cell["row"]], cell["column"]
        if not cell.get("profile"):
            continue
        if column in _COLUMNS:
            yield from _ours(cell["profile"], row.tokens, _COLUMNS[column])
        elif column == _COMPILED:
            yield from _compiled(cell["profile"], row)


def _ours(profile: Iterable[Mapping[str, Any]], tokens: int, attention: str) -> Iterator[Done]:
    """Yield the ops of one of our layers by what they serve."""
    norms = rotation = 0.0
    width, dtype = 0, ""
    rms: tuple[float, float] = (0.0, 0.0)
    entries = [_Entry(one) for one in profile if _TENSOR.findall(one["shapes"])]
    for one in entries:
        if one.rows != tokens:
            yield from _short(one)
        elif "linear" in one.name:
            yield _linear(one)
            dtype = one.dtype
        elif one.name.startswith("attention"):
            yield _attention(one, attention)
        elif one.name.startswith(_NORM):
            norms += one.ms
            width = one.width
        elif one.name.startswith(("gelu_quantize", "quantize_per_token", "norm_rotate_quantize")):
            kind = one.name.removesuffix("_triton")
            yield f"{kind} {one.made}", (tokens, one.width), one.calls * tokens * one.width, one.ms
        elif one.name.startswith("rms_norm"):
            rms = one.calls, one.ms
        elif one.name.startswith(_ROTATION) and one.is_large:
            rotation += one.ms
    elements = float(tokens * width)
    yield f"norm_quantize {dtype}", (tokens, width), 3 * elements, norms
    calls, time = rms
    yield "rms_norm", (tokens, width), calls * elements, time
    if rotation:  # two norms, of q and k, are part of it
        rotation += time * (calls - 1) / calls
        yield "norm_rotate float", (tokens, width), 2 * elements, rotation


def _short(one: _Entry) -> Iterator[Done]:
    """Yield a product over text; what else reads text takes no time to speak of."""
    if "linear" in one.name and one.is_large:
        yield _linear(one)


def _linear(one: _Entry) -> Done:
    outputs, inputs = one.tensors[1][0]
    shape = one.rows, inputs, outputs
    return f"linear {one.dtype}", shape, one.calls * 2 * one.rows * inputs * outputs, one.ms


def _attention(one: _Entry, in_8_bits: str) -> Done:
    _, heads, queries, width = one.tensors[0][0]
    keys = one.keys
    work = one.calls * 4.0 * heads * queries * keys * width
    name = in_8_bits if one.dtype in ("int8", "fp8") else one.dtype
    return f"attention {name}", (heads, queries, keys, width), work, one.ms


def _compiled(profile: Iterable[Mapping[str, Any]], row: h100_plan.Row) -> Iterator[Done]:
    """Yield bf16 products, at the mean rate of a layer, and torch.compile's passes over memory."""
    config = presets.find(row.preset).config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    hidden, tokens = config["ffn_dim"], row.tokens
    ms: dict[str, float] = defaultdict(float)
    for one in profile:
        ms[one["part"]] += one["ms"]
    # q, k, v and both outputs and the query of text are alike.
    shapes = [(tokens, width, width, 6), (tokens, width, hidden, 1), (tokens, hidden, width, 1)]
    shapes.append((_TEXT_TOKENS, width, width, 2))
    flops = [2.0 * m * k * n * calls for m, k, n, calls in shapes]
    for (m, k, n, _), amount in zip(shapes, flops, strict=True):
        yield "linear bf16", (m, k, n), amount, ms["linears"] * amount / sum(flops)
    yield "compiled passes", (tokens, width), float(tokens * width), ms["elementwise"]


class _Entry:
    """One line of a profile, its shapes taken apart."""

    def __init__(self, line: Mapping[str, Any]) -> None:
        self.name: str = line["op"].rpartition("wancompile_kernels.")[2].removeprefix("aten.")
        self.ms, self.calls = float(line["ms"]), float(line["calls"])
        self.tensors = [
            (tuple(map(int, sizes.split("x"))), dtype)
            for sizes, dtype in _TENSOR.findall(line["shapes"])
        ]
        first, self.dtype = self.tensors[0]
        self.made = self.tensors[-1][1]
        is_heads = len(first) == 4 and self.name.startswith("attention")
        self.rows = first[2] if is_heads else first[1] if len(first) > 1 else 1
        self.width = first[-1]
        self.is_large = self.ms > 0.01

    @property
    def keys(self) -> int:
        """The number of keys; a profile leaves tensors out that are small beside the others."""
        shapes = [sizes for sizes, _ in self.tensors]
        return shapes[1][2] if len(shapes) > 2 else _TEXT_TOKENS


def main(argv: Sequence[str] | None = None) -> None:
    """Read, add up and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TABLES["h100"])
    options = parser.parse_args(argv)
    print(write(options.out, *measured()))


def measured() -> tuple[str, list[Mapping[str, Any]]]:
    """Return the device, and the cells of all runs on it."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(SOURCE))]
    (device,) = {one["measured_on"]["gpu"] for one in runs}
    return device, [cell for one in runs for cell in one["results"]]


def write(path: Path, device: str, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write the table, a line a rate."""
    head = {"device": device, "source": f"benchmarks/results/{SOURCE}"}
    kinds = [
        f'    "{kind}": [\n' + ",\n".join(f"      {json.dumps(rate)}" for rate in rates) + "\n    ]"
        for kind, rates in table(results).items()
    ]
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in head.items()]
    body = "\n".join(["{", *lines, '  "rates": {', ",\n".join(kinds), "  }", "}", ""])
    path.write_text(body, encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
