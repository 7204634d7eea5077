"""The compiled experts of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from wancompile.compiled import CompiledModel
from wancompile.experts.attach import attach
from wancompile.experts.facts import Calibrated
from wancompile.experts.loras import ExpertsTakeLoras
from wancompile.experts.pipe import Pipeline
from wancompile.experts.save import save
from wancompile.report import Report


@dataclass(frozen=True)
class PipelineReport:
    """What was done to each expert: its `Report`, and the calls that it was calibrated on.

    `boundary` is the share of the noise at which the pipeline switches experts, None where it has
    one.
    """

    experts: Mapping[str, Report]
    calibrated: Mapping[str, Calibrated | None]
    boundary: float | None

    def __str__(self) -> str:
        headers = ["expert", "calls", "timesteps", "weights", "output error"]
        rows = [self._row(name) for name in self.experts]
        table = str(tabulate(rows, headers=headers, disable_numparse=True))
        parts = [f"{name}: {report}" for name, report in self.experts.items()]
        where = "" if self.boundary is None else f"\nboundary_ratio {self.boundary:g}"
        return "\n\n".join([table + where, *parts])

    def _row(self, name: str) -> list[str]:
        report, known = self.experts[name], self.calibrated[name]
        sizes = f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB"
        outputs = () if report.gate is None else report.gate.check.outputs
        error = f"{100 * max(one.relative for one in outputs):.2f} %" if outputs else "-"
        if known is None:
            return [name, "-", "-", sizes, error]
        return [name, str(known.calls), known.span, sizes, error]


class CompiledPipeline(ExpertsTakeLoras):
    """The compiled transformers of one pipeline, to be attached to it and saved together.

    LoRAs come and go with `load_lora`, `set_lora` and `unload_lora`, or are merged with
    `merge_lora`, whether it is attached or not.

    Attributes:
        experts: the compiled models by the name that they have in the pipeline.
        calibrated: how many calls each was calibrated on and their timesteps; None without data.
        boundary: the pipeline's boundary_ratio.
    """

    def __init__(
        self,
        experts: Mapping[str, CompiledModel],
        calibrated: Mapping[str, Calibrated | None],
        boundary: float | None,
    ) -> None:
        self.experts = dict(experts)
        self.calibrated = dict(calibrated)
        self.boundary = boundary

    @property
    def report(self) -> PipelineReport:
        """What was rewritten in each expert, what was skipped and why; `print` it."""
        reports = {name: model.report for name, model in self.experts.items()}
        return PipelineReport(reports, self.calibrated, self.boundary)

    def attach(self, pipe: Pipeline) -> None:
        """Put every expert into its place in `pipe`; where it offloads its parts, these, too.

        The pipeline may have been loaded without the originals (`transformer=None`). From then on
        `pipe.save_pretrained` is an error, as long as a compiled expert is in it.

        Raises:
            PipelineError: the experts are not those of this pipeline: others are in it, of another
                configuration, or it switches at another timestep. It is then as it was.
        """
        attach(pipe, self.experts, self.boundary)

    def save(self, folder: str | Path) -> None:
        """Write all experts to one folder, for `wancompile.load`.

        The folder appears whole or not at all, and may replace an older one.

        Raises:
            ArtifactError: as `CompiledModel.save`.
        """
        save(self.experts, self.calibrated, self.boundary, folder)
