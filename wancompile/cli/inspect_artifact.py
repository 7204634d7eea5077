"""`wancompile inspect` on a saved model: its report, its graph, its page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wancompile.artifact import document
from wancompile.cli import artifact
from wancompile.compiled import CompiledModel
from wancompile.html import write_html
from wancompile.inspect import lines
from wancompile.ir.levels import Level
from wancompile.units import nbytes, plural

# What speaks of making a model, which has been done; the values are those of nothing asked.
_MAKING = {
    "start": None,
    "diff": False,
    "tiny": False,
    "layers": None,
    "resolution": None,
    "calibrate": 0,
    "dump": None,
    "recipe": None,
}


def run(args: argparse.Namespace) -> None:
    """Print the report of each saved model, or its graph, or write its page."""
    _refuse_making(args)
    for part, folder in artifact.parts(Path(args.target)).items():
        # `check` compares every byte; looking at a graph needs none of the weights.
        model = artifact.load_model(folder, verify=False)
        name = part or folder.resolve().name
        if args.html is not None:
            path = artifact.page(args.html, part)
            programs = (model.program,)
            write_html(path, model.report, programs=programs, title=name, block=args.site)
            print(f"wrote {path}", file=sys.stderr)
        elif args.to is not None or args.site is not None:
            print("\n".join(line.text for line in lines(model.program, args.site)))
        else:
            print(f"{_facts(name, folder, model)}\n\n{model.report}\n")


def _refuse_making(args: argparse.Namespace) -> None:
    for name, nothing in _MAKING.items():
        if getattr(args, name) != nothing:
            option = "from" if name == "start" else name
            args.parser.error(f"--{option} does not go with a saved model, which is made already")
    if args.to not in (None, Level.LOWERED):
        args.parser.error(f"a saved model is at level LOWERED, not {args.to.name}")


def _facts(name: str, folder: Path, model: CompiledModel) -> str:
    made = document.read(folder)["made_by"]
    by = ", ".join(f"{tool} {version}" for tool, version in made.items())
    inputs = [
        f"{spec.name}[{'x'.join('*' if one is None else str(one) for one in spec.shape)}]"
        for spec in model.program.signature.inputs
    ]
    files = plural(len(artifact.files(folder)), "file")
    return "\n".join(
        [
            f"{name}: {nbytes(artifact.size_on_disk(folder))} in {files}, made by {by}",
            f"{plural(len(model.report.groups), 'group')} of linears, "
            f"{plural(len(model.program.attentions), 'attention')}",
            f"called with {', '.join(inputs)}",
        ]
    )
