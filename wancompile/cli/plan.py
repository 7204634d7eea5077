"""`wancompile plan`: print a plan."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict

from wancompile.cli import target
from wancompile.cli.plan_text import WIDTH, as_text
from wancompile.plan import Plan, plan


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="say what would be quantized, how small it gets and what a call costs",
        description="Trace a model without its weights and say what a recipe would do to it: "
        "groups, folds, bytes, and the FLOPs of one call by part.",
    )
    target.add_arguments(parser)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    """Plan and print."""
    recipe = target.recipe(args.recipe)
    subject = target.on_meta(args)
    found = plan(subject.model, subject.inputs, recipe)
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    print(as_json(found) if args.json else as_text(subject, found, width))


def as_json(found: Plan) -> str:
    """Return the plan as JSON: its fields, and the totals."""
    totals = {
        name: getattr(found, name)
        for name in ("bytes_before", "bytes_after", "flops", "quantized_flops")
    }
    return json.dumps({**asdict(found), **totals}, indent=2)
