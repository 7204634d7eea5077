"""`wancompile plan`: print a plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap

from tabulate import tabulate

from wancompile import cli_model
from wancompile.plan import GroupPlan, Leftover, Plan, plan
from wancompile.units import count, flops, nbytes, percent, plural, seconds, shape

# Of the linears that share a reason, so many are named; the rest is counted.
NAMED = 3
WIDTH = 100


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="say what would be quantized, how small it gets and what a call costs",
        description="Trace a model without its weights and say what a recipe would do to it: "
        "groups, folds, bytes, and the FLOPs of one call by part.",
    )
    cli_model.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    """Plan and print."""
    recipe = cli_model.recipe(args.recipe)
    subject = cli_model.on_meta(args)
    found = plan(subject.model, subject.inputs, recipe)
    print(as_json(found) if args.json else as_text(subject, found))


def as_json(found: Plan) -> str:
    """Return the plan as JSON: its fields, and the totals."""
    totals = {
        name: getattr(found, name)
        for name in ("bytes_before", "bytes_after", "flops", "quantized_flops")
    }
    return json.dumps({**asdict(found), **totals}, indent=2)


def as_text(subject: cli_model.Subject, found: Plan) -> str:
    """Return the plan as text for a terminal."""
    parts = [
        _facts(subject, found),
        _sizes(found),
        _groups(found.groups),
        _reasons(found.groups),
        _leftovers(found.leftovers),
        _work(found),
        _cost(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(subject: cli_model.Subject, found: Plan) -> str:
    facts = found.facts
    dtypes = ", ".join(f"{nbytes(size)} {dtype}" for dtype, size in facts.dtypes.items())
    inputs = [f"{one.name} {shape(one.shape)}" for one in facts.inputs]
    attentions = f"{facts.self_attentions} self- and {facts.cross_attentions} cross-attentions"
    lines = [
        f"{subject.name}: {subject.description}",
        f"{count(facts.parameters)} parameters, {dtypes}",
        f"{attentions}, {facts.heads} heads of {facts.head_dim}, {facts.tokens:,} video tokens",
        *wrap(", ".join(inputs), WIDTH, break_long_words=False, break_on_hyphens=False),
    ]
    if subject.experts > 1:
        lines.append(f"One of {subject.experts} transformers of this kind in the pipeline.")
    return "\n".join(lines)


def _sizes(found: Plan) -> str:
    share = percent(found.bytes_after / max(1, found.bytes_before))
    sizes = f"{nbytes(found.bytes_before)} to {nbytes(found.bytes_after)} ({share})"
    attention = found.recipe.attention
    wish = f"q and k of self-attention in {attention}" if attention else "attention in float"
    return f"Recipe {found.recipe.name}: weights {sizes}, {wish}"


def _groups(groups: Sequence[GroupPlan]) -> str:
    rows = [
        [
            one.role,
            one.groups,
            one.linears,
            one.source,
            one.fold,
            one.dtype or "float",
            nbytes(one.bytes_before),
            nbytes(one.bytes_after),
        ]
        for one in groups
    ]
    headers = ["role", "groups", "linears", "reads", "1/s goes to", "in", "before", "after"]
    return _table(rows, headers, right={"groups", "linears", "before", "after"})


def _reasons(groups: Sequence[GroupPlan]) -> str:
    lines = [f"  {one.role}: {one.fold_reason}" for one in groups if one.fold_reason and one.dtype]
    return "\n".join(["1/s goes to the quantise op:", *lines]) if lines else ""


def _leftovers(leftovers: Sequence[Leftover]) -> str:
    if not leftovers:
        return ""
    lines = ["In no group, left in floating point:"]
    for one in leftovers:
        lines.append(f"  {plural(len(one.sites), 'linear')}, {nbytes(one.nbytes)}: {one.reason}")
        lines.append(f"    {_named(one.sites)}")
    return "\n".join(lines)


def _named(sites: Sequence[str]) -> str:
    more = len(sites) - NAMED
    return ", ".join(sites[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _work(found: Plan) -> str:
    total = max(1, found.flops)
    rows = [_work_row(one.part, one.calls, one.flops, one.quantized, total) for one in found.work]
    calls = sum(one.calls for one in found.work)
    rows.append(_work_row("total", calls, found.flops, found.quantized_flops, total))
    headers = ["one call of the model", "calls", "work", "share", "in 8 bits"]
    return _table(rows, headers, right={"calls", "work", "share", "in 8 bits"})


def _work_row(part: str, calls: int, done: int, quantized: int, total: int) -> list[object]:
    in_8_bits = percent(quantized / max(1, done)) if quantized else "-"
    return [part, calls, flops(done), percent(done / total), in_8_bits]


def _cost(found: Plan) -> str:
    peak = f", peak memory {nbytes(found.peak_bytes)}" if found.peak_bytes is not None else ""
    linears = sum(one.linears for one in found.groups)
    return (
        f"{plural(linears, 'linear')} in {sum(one.groups for one in found.groups):,} groups; "
        f"planned in {seconds(found.seconds)}{peak}"
    )


def _table(rows: Sequence[Sequence[object]], headers: list[str], *, right: set[str]) -> str:
    aligned = ["right" if header in right else "left" for header in headers]
    return str(tabulate(rows, headers=headers, colalign=aligned, disable_numparse=True))
