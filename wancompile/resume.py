"""A calibration that goes on where it was stopped.

The file is that of `Stats`, so it can be compiled with at any time, and also says which calls are
in it. A list of calls that are all in it is not run at all. A callable has to be played from its
start, for its later calls come out of its earlier ones: calls that are in the file then run without
being observed, which costs their time but counts nothing twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancompile.calibrate import Calibration
from wancompile.digest import of_call
from wancompile.errors import CalibrationError
from wancompile.quant.stats import Stats, load_notes
from wancompile.samples import Call

_NOTE = "checkpoint"
# Writing may take this share of the time of observing.
_SHARE = 0.05


class Resumable:
    """Observes calls and keeps what was learned in a file; passes over calls that are in it.

    Args:
        calibration: new, made with `options`.
        path: the file; nothing has to be there yet.
        options: what the statistics depend on besides the model and the data.
        live: whether the outputs of calls are used, and decide the calls after them.

    Raises:
        CalibrationError: the file is no checkpoint, or one of another model or other options.
    """

    def __init__(
        self, calibration: Calibration, path: Path, options: Mapping[str, Any], *, live: bool
    ) -> None:
        self._calibration = calibration
        self._path = path
        self._options = dict(options)
        self._live = live
        self._digests: list[str] = []
        self._seen = 0  # calls that came by
        self._kept = 0  # calls that are in the file
        self._start = 0  # calls that were in it at first
        self._ready_at = time.monotonic()
        if not path.parent.is_dir():
            raise CalibrationError(f"there is no folder {path.parent} for the checkpoint")
        if path.exists():
            self._load()

    def __call__(self, call: Call, label: str) -> Any:
        """Return the output of a call, or None where it is in the file and nobody needs it.

        Raises:
            CalibrationError: the call is another one than the file counts in this place.
        """
        # What comes out of the model may differ by rounding when it comes out again.
        digest = of_call(call, label, values=not self._live or self._seen == 0)
        if self._seen < self._start:
            self._check(digest)
            self._seen += 1
            return self._calibration.replay(call) if self._live else None
        self._digests[self._calibration.calls :] = [digest]
        output = self._calibration.observe(call, label)
        self._seen += 1
        if time.monotonic() >= self._ready_at:
            self.keep()
        return output

    def keep(self) -> None:
        """Write what has been learned unless the file has it."""
        count = self._calibration.calls
        if count == self._kept:
            return
        started = time.monotonic()
        facts = {"options": self._options, "live": self._live, "digests": self._digests[:count]}
        self._calibration.stats().save(self._path, {_NOTE: json.dumps(facts)})
        self._kept = count
        now = time.monotonic()
        self._ready_at = now + (now - started) / _SHARE

    def finish(self) -> None:
        """Check that the data held every call of the file.

        Raises:
            CalibrationError: it ended before.
        """
        if self._seen < self._start:
            raise CalibrationError(
                f"{self._path} counts {self._start} calls, and the data has only "
                f"{self._seen}: it has changed, or this is not its checkpoint",
                pass_name="calibrate",
            )

    def _load(self) -> None:
        stats, notes = Stats.load(self._path), load_notes(self._path)
        try:
            facts = json.loads(notes[_NOTE])
            options, live, digests = facts["options"], facts["live"], facts["digests"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{self._path} holds statistics, but is no checkpoint to go on from"
            ) from error
        self._refuse_others(stats, {**options, "live": live})
        self._calibration.restore(stats)
        self._digests = list(digests)
        self._start = self._kept = stats.calls

    def _refuse_others(self, stats: Stats, options: Mapping[str, Any]) -> None:
        if stats.model != self._calibration.model:
            raise CalibrationError(f"{self._path} is the checkpoint of another model")
        for name, mine in {**self._options, "live": self._live}.items():
            if options.get(name) != mine:
                what = "a callable" if name == "live" else name
                raise CalibrationError(
                    f"{self._path} was made with {what} = {options.get(name)}, not {mine}"
                )

    def _check(self, digest: str) -> None:
        if digest != self._digests[self._seen]:
            raise CalibrationError(
                f"calibration sample {self._seen} is not the one that {self._path} counts: the "
                f"data has changed since, or this is not its checkpoint",
                pass_name="calibrate",
            )
