"""Calls that the observers did not see, and what the original did on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError
from wancompile.gate.record import Record, on_device, take
from wancompile.ir import match
from wancompile.program import Program
from wancompile.samples import Run

# Every ninth call from the fourth on, four at most. Guided sampling calls a model in pairs, with
# and without the prompt: an odd distance takes both in turn, and walks through the timesteps. Later
# ones are kept where they lie deeper in the schedule, for the last steps err most.
FIRST, DISTANCE, MOST = 3, 9, 4


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a compiled model has to reproduce.

    `calls` are named arguments of forward and `references` the records of the original on them, all
    on the host. `held_out` says that nothing was calibrated on these calls.
    """

    calls: tuple[Mapping[str, Any], ...]
    references: tuple[Record, ...]
    held_out: bool

    @classmethod
    def of(
        cls,
        original: Program,
        calls: Iterable[Mapping[str, Any]],
        *,
        held_out: bool = False,
        device: torch.device | None = None,
    ) -> Evidence:
        """Run `original` on each call; `device` is where it computes, if not where it is."""
        given = tuple(on_device(call, _HOST) for call in calls)
        return cls(given, tuple(take(original, one, device=device)[1] for one in given), held_out)


_HOST = torch.device("cpu")


class HoldBack:
    """Passes calls on to an observer, but for a few: those run too, and are kept.

    `observe` takes the others, a `Resumable` of the calibration for one; `calibration` itself if
    not given.
    """

    def __init__(
        self,
        calibration: Calibration,
        original: Program,
        device: torch.device | None = None,
        observe: Run | None = None,
    ) -> None:
        self._calibration = calibration
        self._observe: Run = observe or calibration.observe
        self._original = original
        self._device = device
        self._seen = 0
        self._calls: list[Mapping[str, Any]] = []
        self._records: list[Record] = []

    def __call__(self, call: dict[str, Any], label: str = "") -> Any:
        """Return what the model returns.

        Raises:
            CalibrationError: the call drives NaN or infinity through the model.
        """
        index, self._seen = self._seen, self._seen + 1
        if not self._holds(index, call):
            return self._observe(call, label)
        # Whoever made the call may write to its tensors afterwards.
        kept = on_device(call, _HOST, copy=True)
        output, record = take(self._original, call, device=self._device)
        self._check_finite(record, index)
        self._calibration.passed_over += 1
        self._calls.append(kept)
        self._records.append(record)
        if self.held > MOST:
            self._let_go()
        return output

    @property
    def held(self) -> int:
        """How many calls were kept from the observer so far."""
        return len(self._calls)

    def evidence(self) -> Evidence:
        """Return what was held back."""
        return Evidence(tuple(self._calls), tuple(self._records), held_out=True)

    def _holds(self, index: int, call: Mapping[str, Any]) -> bool:
        if index % DISTANCE != FIRST:
            return False
        if self.held < MOST:
            return True
        step, known = self._original.signature.timestep(call), self._steps
        return step is not None and len(known) == MOST and step < min(known)

    @property
    def _steps(self) -> list[float]:
        """The timesteps of the calls that were kept, of those that have one."""
        found = map(self._original.signature.timestep, self._calls)
        return [step for step in found if step is not None]

    def _let_go(self) -> None:
        """Drop the call between whose neighbours in the schedule the distance is least."""
        steps = self._steps
        order = sorted(range(self.held), key=steps.__getitem__)
        inner = zip(order, order[1:], order[2:], strict=False)
        _, least, _ = min(inner, key=lambda three: steps[three[2]] - steps[three[0]])
        del self._calls[least], self._records[least]

    def _check_finite(self, record: Record, index: int) -> None:
        if not record.broken:
            return
        first = next(iter(record.broken))
        nodes = {str(site): node for site, node in match.by_site(self._original.graph).items()}
        raise CalibrationError(
            f"sample {index} drives NaN or infinity out of this place",
            site=first,
            source=match.source_line(nodes[first]) if first in nodes else None,
            pass_name="calibrate",
        )
