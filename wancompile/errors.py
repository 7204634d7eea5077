"""The few kinds of error a user can meet; each names site, source line, pass and reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wancompile.gate.check import Check


class WancompileError(Exception):
    """Base of every error raised on purpose.

    The message is one sentence with the reason, followed by one line for each thing that is known:
    the `site` (module path and call index), the `source` line of the model that made the node, and
    the `pass_name` that refused.
    """

    def __init__(
        self,
        reason: str,
        *,
        site: str | None = None,
        source: str | None = None,
        pass_name: str | None = None,
    ) -> None:
        self.reason = reason
        self.site = site
        self.source = source
        self.pass_name = pass_name
        known = (("site", site), ("source", source), ("pass", pass_name))
        lines = [f"  {label}: {value}" for label, value in known if value]
        super().__init__("\n".join([reason, *lines]))

    def add_expert(self, name: str) -> None:
        """Say which expert of a pipeline this is about."""
        self.args = (f"{self}\n  expert: {name}",)


@contextmanager
def of_expert(name: str) -> Iterator[None]:
    """Add the name of an expert to whatever goes wrong inside; no name, nothing added."""
    try:
        yield
    except WancompileError as error:
        if name:
            error.add_expert(name)
        raise


class InputError(WancompileError):
    """A call, an example or a calibration sample does not fit the model's forward."""


class ExportError(WancompileError):
    """torch.export could not capture the model, or made a dimension static that must not be."""


class LevelError(WancompileError):
    """A graph breaks the invariants of its level: an unknown op, a missing value, a lost linear."""


class DetectionError(WancompileError):
    """The graph holds no attention, so there is nothing this compiler knows how to prove."""


class RecipeError(WancompileError):
    """A recipe is malformed, or one of its rules matches nothing."""


class CalibrationError(WancompileError):
    """Calibration data is empty, or it drove a NaN or an infinity through the model."""


class NumericsError(WancompileError):
    """A weight holds NaN or infinity, or a rewrite that must be exact changed the output."""


class PipelineError(WancompileError):
    """A pipeline has nothing to compile, or is no place for what was compiled.

    Or a compiled part is asked for what only the original can do.
    """


class ArtifactError(WancompileError):
    """A model cannot be saved, or what was saved is damaged, foreign or of another format."""


class LoraError(WancompileError):
    """A LoRA is of another model, broken, or changes what only a whole model can be changed in."""


class GateError(WancompileError):
    """A compiled model is too far from the original, or holds NaN; `check` has all figures."""

    def __init__(self, reason: str, *, check: Check) -> None:
        self.check = check
        super().__init__(reason)
