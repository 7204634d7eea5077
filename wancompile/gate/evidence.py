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

# A short schedule ends before many of these. From the eighth call on, so that three in four are
# observed, one more is kept on loan: the deepest so far, which the observer gets once there is a
# deeper one. That takes a forward more each time, so it ends where the distance suffices.
LOAN_FIRST, LOAN_END = 7, 24


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


@dataclass(frozen=True, eq=False)
class _Kept:
    """A call on the host, of kind `label`, and what the original did on it.

    The observer gets it yet if it is on loan and a deeper one is kept.
    """

    call: dict[str, Any]
    label: str
    record: Record
    is_on_loan: bool


class HoldBack:
    """Passes calls on to an observer, but for a few: those run too, and are kept.

    `observe` takes the others, a `Resumable` of the calibration for one; `calibration` itself if
    not given. It also takes what was kept on loan, later than it came by.
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
        self._kept: list[_Kept] = []

    def __call__(self, call: dict[str, Any], label: str = "") -> Any:
        """Return what the model returns.

        Raises:
            CalibrationError: the call drives NaN or infinity through the model.
        """
        index, self._seen = self._seen, self._seen + 1
        is_regular = index % DISTANCE == FIRST
        may_be_held = is_regular or LOAN_FIRST <= index < LOAN_END
        is_deepest = may_be_held and self._is_deepest(call)
        if not is_deepest and not (is_regular and self.held < MOST):
            return self._observe(call, label)
        # Whoever made the call may write to its tensors afterwards.
        kept = on_device(call, _HOST, copy=True)
        output, record = take(self._original, call, device=self._device)
        self._check_finite(record, index)
        if is_deepest:
            self._give_back()
        self._calibration.passed_over += 1
        self._kept.append(_Kept(kept, label, record, not is_regular))
        if self.held > MOST:
            self._let_go()
        return output

    @property
    def held(self) -> int:
        """How many calls were kept from the observer so far."""
        return len(self._kept)

    def evidence(self) -> Evidence:
        """Return what was held back."""
        records = tuple(one.record for one in self._kept)
        return Evidence(tuple(one.call for one in self._kept), records, held_out=True)

    def _is_deepest(self, call: Mapping[str, Any]) -> bool:
        """Whether a call lies deeper in the schedule than all that were kept, as far as known."""
        step, known = self._original.signature.timestep(call), self._steps
        return step is not None and len(known) == self.held > 0 and step < min(known)

    @property
    def _steps(self) -> list[float]:
        """The timesteps of the calls that were kept, of those that have one."""
        found = (self._original.signature.timestep(one.call) for one in self._kept)
        return [step for step in found if step is not None]

    def _give_back(self) -> None:
        """Let the observer have the call that is on loan, if there is one."""
        loan = next((one for one in self._kept if one.is_on_loan), None)
        if loan is None:
            return
        self._kept.remove(loan)
        self._calibration.passed_over -= 1
        self._observe(on_device(loan.call, self._original.device), loan.label)

    def _let_go(self) -> None:
        """Drop the call between whose neighbours in the schedule the distance is least."""
        steps = self._steps
        order = sorted(range(self.held), key=steps.__getitem__)
        inner = zip(order, order[1:], order[2:], strict=False)
        _, least, _ = min(inner, key=lambda three: steps[three[2]] - steps[three[0]])
        del self._kept[least]

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
