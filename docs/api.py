"""docs/api.md, from the docstrings of what users import and get back.

    python -m docs.api > docs/api.md

`SECTIONS` says what is in it and in which order; everything in `wancompile.__all__` has to be. Of
a class it shows all public methods and properties, those inherited from the compiler's own, too.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

import wancompile
from docs.rendering import Constant, described, title
from wancompile import backend, errors, interchange, pipeline, presets, recipe, samples
from wancompile import inspect as inspect_program
from wancompile.auto import Choice
from wancompile.candidates import Point
from wancompile.experts import loras, pipe, play
from wancompile.experts.compiled import PipelineReport
from wancompile.experts.facts import Calibrated
from wancompile.gate import again
from wancompile.gate.check import Kind, Violation
from wancompile.gate.compare import Comparison, SiteError, compare
from wancompile.gate.fallback import Fallback
from wancompile.gate.rounds import Gate
from wancompile.hoist import Hoisting
from wancompile.html import write_html
from wancompile.ir import site
from wancompile.ir.edit import Note
from wancompile.lora import files
from wancompile.program import PassRecord
from wancompile.quant.stability import Moved, Stability
from wancompile.quant.stats import ChannelStats, HeadStats
from wancompile.report import RoleSummary, Skip, Stored
from wancompile.sensitivity import SiteSensitivity, Together
from wancompile.signature import InputSpec, Signature
from wancompile.times import Measured, PartTime, Predicted, measure

_HEAD = """\
# API

Written by `python -m docs.api` from the docstrings. Dimensions are in brackets: `[N, K]` is a
matrix of N rows. Errors are in relative L2, 0.01 is 1 %.
"""


@dataclass(frozen=True)
class Section:
    """A title, and the classes, functions, modules and constants below it."""

    title: str
    things: tuple[Any, ...]


SECTIONS = (
    Section(
        "Compiling",
        (
            wancompile.compile,
            wancompile.load,
            wancompile.trace,
            wancompile.CompiledModel,
            wancompile.CompiledPipeline,
        ),
    ),
    Section(
        "What to quantize into what",
        (
            Constant(recipe, "RECIPES"),
            wancompile.Recipe,
            wancompile.QSpec,
            wancompile.Rule,
            wancompile.AttentionSpec,
            wancompile.AttentionRule,
            wancompile.Auto,
            Constant(recipe, "LINEARS"),
            Constant(recipe, "ATTENTIONS"),
        ),
    ),
    Section(
        "Calibration",
        (
            wancompile.calibrate,
            wancompile.Sample,
            wancompile.Stats,
            ChannelStats,
            HeadStats,
            Stability,
            Moved,
        ),
    ),
    Section(
        "Errors of a compiled model",
        (
            wancompile.Limits,
            wancompile.Check,
            SiteError,
            Violation,
            Kind,
            compare,
            Comparison,
            wancompile.sensitivity,
            wancompile.Sensitivity,
            SiteSensitivity,
            Together,
        ),
    ),
    Section(
        "Reports",
        (
            wancompile.Report,
            write_html,
            RoleSummary,
            Stored,
            Skip,
            Gate,
            Fallback,
            Choice,
            Point,
            Hoisting,
            Predicted,
            PartTime,
            measure,
            Measured,
            PipelineReport,
            Calibrated,
        ),
    ),
    Section(
        "Programs",
        (
            wancompile.Program,
            inspect_program.lines,
            inspect_program.diff,
            inspect_program.climb,
            pipeline.run,
            pipeline.Pass,
            pipeline.Probe,
            wancompile.Level,
            wancompile.Site,
            wancompile.Group,
            wancompile.Role,
            site.Source,
            site.Fold,
            site.Smoothing,
            site.Span,
            site.Rounding,
            site.Weight,
            site.Ungrouped,
            wancompile.Attention,
            PassRecord,
            Note,
            Signature,
            InputSpec,
        ),
    ),
    Section("torch.compile", (backend,)),
    Section("Presets", tuple(getattr(presets, name) for name in ("find", "build", "load"))),
    Section("Other formats", (interchange, interchange.write, interchange.Summary)),
    Section(
        "Exceptions",
        tuple(
            one
            for one in vars(errors).values()
            if inspect.isclass(one) and issubclass(one, errors.WancompileError)
        ),
    ),
    Section(
        "Names in signatures",
        (
            Constant(samples, "CalibData"),
            Constant(play, "PipelineData"),
            pipe.Pipeline,
            Constant(again, "Inputs"),
            Constant(files, "Stored"),
            Constant(loras, "Given"),
            Constant(loras, "Reference"),
        ),
    ),
)


def document() -> str:
    """Return the whole document as Markdown."""
    parts = [_HEAD, *map(_contents, SECTIONS)]
    text = ["\n".join(parts)]
    for section in SECTIONS:
        text.append(f"## {section.title}")
        text += [part for thing in section.things for part in described(thing)]
    return "\n\n".join(text) + "\n"


def _contents(section: Section) -> str:
    links = [_link(title(one)) for one in section.things if not inspect.ismodule(one)]
    return f"- {_link(section.title)}" + (f": {', '.join(links)}" if links else "")


def _link(title: str) -> str:
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title.removeprefix('class ')}](#{anchor})"


if __name__ == "__main__":
    sys.stdout.write(document())
