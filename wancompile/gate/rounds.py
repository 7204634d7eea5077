"""Smoothing and quantization within limits: what is beyond them goes back to higher precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from wancompile import passes, pipeline
from wancompile.errors import GateError
from wancompile.gate.check import Check, Kind, check_records, inverses_of
from wancompile.gate.evidence import Evidence
from wancompile.gate.fallback import Fallback, Relaxed, relax_own, relax_sites
from wancompile.gate.limits import Limits
from wancompile.gate.record import take
from wancompile.ir.levels import Level
from wancompile.ir.site import Site
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe
from wancompile.units import plural

ROUNDS = 8
"""How often a program is quantized and measured; each time something less is in 8 bits."""

# Whatever else is beyond a limit has gone back to float, or there was nothing left to go back.
_DECISIVE = (Kind.BROKEN, Kind.OUTPUT, Kind.BLOCK)


@dataclass(frozen=True)
class Gate:
    """What a compiled model was let through with: its figures, and what fell back on the way."""

    check: Check
    fallbacks: tuple[Fallback, ...] = ()

    def __str__(self) -> str:
        from wancompile.gate.text import gate_text

        return gate_text(self)


@dataclass
class Rounds:
    """Takes a program from NORMAL to QUANTIZED within limits.

    Attributes:
        recipe: what to quantize into what; it gets more exceptions on the way.
        stats: to smooth by, and to judge groups by.
        limits: None lets everything through unmeasured.
        evidence: calls of the original; without them only groups are judged.
        probe: one call on which smoothing is checked to be exact.
        device: where to compute, if not where the weights are.
        dump: a folder for texts and diffs.
        fallbacks: what went back to higher precision so far.
        check: the figures of the quantized program, with the output of every linear.
    """

    recipe: Recipe
    stats: Stats | None
    limits: Limits | None
    evidence: Evidence | None
    probe: pipeline.Probe | None = None
    device: torch.device | None = None
    dump: Path | None = None
    fallbacks: list[Fallback] = field(default_factory=list)
    check: Check | None = None

    def smooth(self, normal: Program) -> Program:
        """Return `normal` smoothed, with a recipe that keeps every group's own error in limits."""
        while True:
            steps = passes.smoothing(self.recipe, self.stats, self.device)
            smoothed = pipeline.run(normal, steps, probe=self.probe, dump=self.dump)
            if self.limits is None:
                return smoothed
            relaxed = relax_own(smoothed, self.recipe, self.limits.own, self.fallbacks)
            if not self._take(relaxed):
                return smoothed

    def quantize(self, normal: Program, smoothed: Program, *, consume: bool = False) -> Program:
        """Return `smoothed` quantized, with a recipe that keeps sites within their limits.

        With `consume` the float weights are gone afterwards, and nothing can fall back any more.
        """
        for left in reversed(range(ROUNDS)):
            inverses = inverses_of(smoothed)
            steps = passes.quantization(self.recipe, self.stats, self.device)
            quantized = pipeline.run(smoothed, steps, dump=self.dump, consume=consume)
            if self.limits is None or self.evidence is None:
                return quantized
            unfused = _unfused(quantized, self.device)
            self.check = self._checked(self.evidence, self.limits, unfused, inverses)
            unfused.release()
            if consume or left == 0:
                return quantized
            if not self._take(relax_sites(quantized, self.recipe, self.check)):
                return quantized
            quantized.release()
            smoothed = self.smooth(normal)
        raise AssertionError("there is at least one round")

    def finish(self, fused: Program) -> Gate | None:
        """Compare the outputs of the program that will run, once lowered; return the figures.

        Raises:
            GateError: the output or a block is too far from the original, or holds NaN or infinity.
        """
        if self.check is None or self.evidence is None or self.limits is None:
            return None
        steps = passes.lowering(self.device or fused.device)
        last = self._checked(self.evidence, self.limits, pipeline.run(fused, steps))
        check = replace(
            self.check,
            outputs=last.outputs,
            clipped={**self.check.clipped, **last.clipped},
            broken={**self.check.broken, **last.broken},
        )
        _require(check)
        return Gate(check, tuple(self.fallbacks))

    def _take(self, relaxed: Relaxed) -> bool:
        """Go on with a relaxed recipe; return whether anything in it is new."""
        self.recipe = relaxed.recipe
        self.fallbacks += relaxed.fallbacks
        return bool(relaxed.fallbacks)

    def _checked(
        self,
        evidence: Evidence,
        limits: Limits,
        program: Program,
        inverses: Mapping[Site, Tensor] | None = None,
    ) -> Check:
        """Compare a program with the evidence: whole if `inverses` are given, else its output."""
        is_whole = inverses is not None
        sites = None if is_whole else ()
        records = [
            take(program, call, sites, blocks=is_whole, device=self.device)[1]
            for call in evidence.calls
        ]
        return check_records(
            program,
            records,
            evidence.references,
            inverses=inverses,
            held_out=evidence.held_out,
            limits=limits,
        )


def _unfused(quantized: Program, device: torch.device | None) -> Program:
    """Return the program with fast kernels, in which every linear still has its output.

    FUSED allows all that QUANTIZED has.
    """
    steps = passes.lowering(device or quantized.device)
    return pipeline.run(replace(quantized, level=Level.FUSED), steps)


def _require(check: Check) -> None:
    found = [one for one in check.violations if one.kind in _DECISIVE]
    if not found:
        return
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    culprits = ", ".join(f"{place} ({100 * figure:.2f} %)" for place, figure in check.culprits())
    calls = plural(check.calls, "held-out call" if check.held_out else "call")
    raise GateError(
        f"on {calls} the compiled model is too far from the original: "
        f"{'; '.join(map(str, found[:3]))}{more}. The largest errors of their own are those of "
        f"{culprits or 'nothing that was measured'}: leave these in float, or allow more with "
        "`limits`",
        check=check,
    )
