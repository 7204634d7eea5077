"""A Wan of two blocks compiled once, and the page of its report, for all tests of pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import zoo

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.gate.compare import Comparison, compare
from wancompile.html import write_html
from wancompile.program import Program
from wancompile.report import Report
from wancompile.times import REST, Measured


@dataclass(frozen=True)
class Made:
    compiled: CompiledModel
    normal: Program
    call: dict[str, object]
    comparison: Comparison

    @property
    def report(self) -> Report:
        return self.compiled.report


@cache
def made() -> Made:
    model, first = zoo.make("t2v")
    data = [first, *(zoo.example("t2v", seed=seed) for seed in range(2, 7))]
    compiled = wancompile.compile(model, data, "int8")
    normal = wancompile.trace(model, first, dynamic=False)
    return Made(compiled, normal, first, compare(normal, compiled.program, first))


def written(path: Path) -> Path:
    """Write the page of its report, with both programs, the comparison, and two times."""
    one = made()
    return write_html(
        path,
        one.report,
        programs=(one.normal, one.compiled.program),
        comparison=one.comparison,
        measured=Measured("a clock of this test", {"attn_qkv_proj": 12.5, REST: 3.0}, 7),
        title="two blocks",
    )
