"""Drive calls through an observed program and collect Stats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wancompile import pipeline
from wancompile.digest import of_state
from wancompile.errors import CalibrationError
from wancompile.ir import match
from wancompile.ir.site import Site
from wancompile.passes.observe import HEAD_LINE, LINE, Observe, buffer_name
from wancompile.program import Program
from wancompile.quant import lines
from wancompile.quant.stats import ChannelStats, HeadStats, Stats
from wancompile.signature import name_arguments
from wancompile.stream import Stream, place

# Schedulers of flow-matching models count timesteps from 0 to 1000.
_TIMESTEPS = 1000.0
_CHANNEL_PARTS = ("amax", "count", "sample", "priority")
_HEAD_PARTS = ("low", "high")


class Calibration:
    """A NORMAL program under observation: call it like the model, then ask for `stats`.

    Args:
        program: at level NORMAL, with real weights.
        labels: number of equal timestep ranges whose statistics are kept apart.
        rows: tokens sampled per producer.
        seed: draws the sample; runs to be merged need different seeds.
        device: where to run; weights that are elsewhere come and go, see `stream`.
        undo: leave no trace of a call that fails or is interrupted, for one more copy of all
            statistics on the device.

    Attributes:
        passed_over: how many calls went by without being observed, to number the others right.
    """

    def __init__(
        self,
        program: Program,
        *,
        labels: int = 10,
        rows: int = 256,
        seed: int = 0,
        device: torch.device | None = None,
        undo: bool = False,
    ) -> None:
        self._program = program
        self._device = device
        self._observed = pipeline.run(program, (Observe(labels, rows, seed),))
        self._run = place(self._observed, device)
        self._state = self._run.state
        self._labels = labels
        self._seed = seed
        self._model = of_state(program.state)
        self._calls = 0
        self.passed_over = 0
        self._tally = [0] * (labels * lines.PER_RANGE)
        self._timesteps: tuple[float, float] | None = None
        self._buffers = [self._state[name] for name in self._buffer_names()]
        self._before = [torch.empty_like(one) for one in self._buffers] if undo else []
        self._plain: Program | Stream | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on one call of the model and observe it; see `observe`."""
        signature = self._observed.signature
        call = name_arguments(signature.parameters, signature.defaults, args, kwargs)
        return self.observe(call)

    def observe(self, call: Mapping[str, Any], label: str = "") -> Any:
        """Run the program on the named arguments of a call of kind `label`, and observe it.

        Raises:
            CalibrationError: the call drove NaN or infinity through an observed value.
        """
        self._plain = None
        step = self._observed.signature.timestep(call)
        line = self._point_at(step, label)
        if self._before:
            torch._foreach_copy_(self._before, self._buffers)
        try:
            output = self._run(**call)
            self._check_finite()
        except BaseException:  # an interrupt, too, must not count half a call
            if self._before:
                torch._foreach_copy_(self._buffers, self._before)
            raise
        self._count(line, step)
        return output

    def replay(self, call: Mapping[str, Any]) -> Any:
        """Run the program on a call without observing it."""
        self._plain = self._plain or place(self._program, self._device)
        return self._plain(**call)

    @property
    def calls(self) -> int:
        """The number of calls observed."""
        return self._calls

    @property
    def model(self) -> str:
        """A digest of the weights."""
        return self._model

    def stats(self) -> Stats:
        """Return what has been observed so far, where the weights are.

        Raises:
            CalibrationError: there was no call yet.
        """
        if self._calls == 0:
            raise CalibrationError("calibration data is empty: no call of the model was seen")
        step = _TIMESTEPS / self._labels
        return Stats(
            channels={site: ChannelStats(*self._copies(site)) for site in self._sites()},
            heads={key: HeadStats(*self._copies(*key)) for key in self._operands()},
            edges=tuple(step * index for index in range(self._labels + 1)),
            calls=self._calls,
            seeds=(self._seed,),
            tally=tuple(self._tally),
            roles={group.observer: str(group.role) for group in reversed(self._observed.groups)},
            timesteps=self._timesteps,
            model=self._model,
        )

    def restore(self, stats: Stats) -> None:
        """Go on from `stats` of the same model, made with the same options.

        Raises:
            CalibrationError: they are of other sites.
        """
        if stats.channels.keys() != set(self._sites()) or stats.heads.keys() != set(
            self._operands()
        ):
            raise CalibrationError("the statistics to go on from are of other sites")
        for site, one in stats.channels.items():
            for part in _CHANNEL_PARTS:
                self._buffer(site, part).copy_(getattr(one, part))
        for (site, operand), head in stats.heads.items():
            for part in _HEAD_PARTS:
                self._buffer(site, f"{operand}.{part}").copy_(getattr(head, part))
        self._calls, self._tally = stats.calls, list(stats.tally)
        self._timesteps = stats.timesteps

    def _sites(self) -> list[Site]:
        return list(dict.fromkeys(group.observer for group in self._observed.groups))

    def _operands(self) -> list[tuple[Site, str]]:
        return [
            (attention.site, operand)
            for attention in self._observed.attentions
            if buffer_name(attention.site, "q.low") in self._state
            for operand in "qkv"
        ]

    def _buffer_names(self) -> list[str]:
        channels = [buffer_name(site, part) for site in self._sites() for part in _CHANNEL_PARTS]
        heads = [
            buffer_name(site, f"{operand}.{part}")
            for site, operand in self._operands()
            for part in _HEAD_PARTS
        ]
        return channels + heads

    def _buffer(self, site: Site, part: str) -> torch.Tensor:
        return self._state[buffer_name(site, part)]

    def _copies(self, site: Site, operand: str = "") -> list[torch.Tensor]:
        parts = [f"{operand}.{part}" for part in _HEAD_PARTS] if operand else _CHANNEL_PARTS
        home = self._observed.device
        return [self._buffer(site, part).to(home, copy=True) for part in parts]

    def _point_at(self, step: float | None, label: str) -> int:
        """Let the observers write to the lines of this call, and return that of channels.

        Without a timestep everything goes to the first range.
        """
        share = (step or 0.0) / _TIMESTEPS
        index = min(self._labels - 1, max(0, int(share * self._labels)))
        kind = lines.KINDS.index(label)
        both = [lines.line_of(half, kind, index, self._labels) for half in range(lines.HALVES)]
        half = lines.half_of(sum(self._tally[line] for line in both))
        for name, line in ((LINE, both[half]), (HEAD_LINE, half * self._labels + index)):
            if name in self._state:  # a model may have nothing of a kind to observe
                self._state[name].fill_(line)
        return both[half]

    def _count(self, line: int, step: float | None) -> None:
        self._calls += 1
        self._tally[line] += 1
        if step is not None:
            low, high = self._timesteps or (step, step)
            self._timesteps = min(low, step), max(high, step)

    def _check_finite(self) -> None:
        sites = self._sites()
        peaks = torch.stack([self._buffer(site, "amax").amax() for site in sites])
        if bool(torch.isfinite(peaks).all()):
            return
        first = sites[int((~torch.isfinite(peaks)).int().argmax())]
        node = match.by_site(self._observed.graph)[first]
        raise CalibrationError(
            f"sample {self._calls + self.passed_over} drives NaN or infinity into this linear",
            site=str(first),
            source=match.source_line(node),
            pass_name="calibrate",
        )
