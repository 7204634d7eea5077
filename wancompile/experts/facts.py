"""What is known of an expert besides its program."""

from __future__ import annotations

from dataclasses import dataclass

from wancompile.quant.stats import Stats


@dataclass(frozen=True)
class Calibrated:
    """The calls that an expert was calibrated on.

    `timesteps` are the smallest and the largest one, None where the expert takes none.
    """

    calls: int
    timesteps: tuple[float, float] | None

    @classmethod
    def of(cls, stats: Stats | None) -> Calibrated | None:
        """Return what `stats` say, None without any."""
        return None if stats is None else cls(stats.calls, stats.timesteps)

    @property
    def span(self) -> str:
        """The timesteps in words, in the order of denoising."""
        if self.timesteps is None:
            return "-"
        return f"{self.timesteps[1]:g} to {self.timesteps[0]:g}"


@dataclass(frozen=True)
class Part:
    """One expert in an artifact: its folder, and the SHA-256 of the document in it."""

    name: str
    sha256: str
    calibrated: Calibrated | None


@dataclass(frozen=True)
class Manifest:
    """What the document of a pipeline's artifact says of its experts; see `CompiledPipeline`."""

    boundary: float | None
    experts: tuple[Part, ...]
