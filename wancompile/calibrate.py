"""Drive calls through an observed program and collect Stats."""

from __future__ import annotations

import math
from typing import Any

import torch

from wancompile import pipeline
from wancompile.errors import CalibrationError
from wancompile.ir import match
from wancompile.passes.observe import LABEL, Observe, buffer_name
from wancompile.program import Program
from wancompile.quant.stats import ChannelStats, HeadStats, Stats

# Schedulers of flow-matching models count timesteps from 0 to 1000.
_TIMESTEPS = 1000.0


class Calibration:
    """A NORMAL program under observation: call it like the model, then ask for `stats`.

    Args:
        program: at level NORMAL, with real weights.
        labels: number of equal timestep ranges whose statistics are kept apart.
        rows: tokens sampled per producer.
        seed: draws the sample; runs to be merged need different seeds.
    """

    def __init__(
        self, program: Program, *, labels: int = 10, rows: int = 256, seed: int = 0
    ) -> None:
        self._observed = pipeline.run(program, (Observe(labels, rows, seed),))
        self._labels = labels
        self._seed = seed
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on one call of the model and observe it.

        Raises:
            CalibrationError: the call drove NaN or infinity through an observed value.
        """
        program = self._observed
        self._set_label(program.signature.bind(args, kwargs))
        output = program(*args, **kwargs)
        self._calls += 1
        self._check_finite()
        return output

    def stats(self) -> Stats:
        """Return what has been observed so far; raise `CalibrationError` before the first call."""
        if self._calls == 0:
            raise CalibrationError("calibration data is empty: no call of the model was seen")
        step = _TIMESTEPS / self._labels
        return Stats(
            channels={site: self._channel(site) for site in self._observer_sites()},
            heads={
                (attention.site, operand): self._head(attention.site, operand)
                for attention in self._observed.attentions
                if buffer_name(attention.site, "q.low") in self._observed.state
                for operand in "qkv"
            },
            edges=tuple(step * index for index in range(self._labels + 1)),
            calls=self._calls,
            seeds=(self._seed,),
        )

    def _observer_sites(self) -> list[Any]:
        return list(dict.fromkeys(group.observer for group in self._observed.groups))

    def _buffer(self, site: Any, part: str) -> torch.Tensor:
        return self._observed.state[buffer_name(site, part)]

    def _channel(self, site: Any) -> ChannelStats:
        parts = ("amax", "count", "sample", "priority")
        return ChannelStats(*(self._buffer(site, part).clone() for part in parts))

    def _head(self, site: Any, operand: str) -> HeadStats:
        bounds = (self._buffer(site, f"{operand}.{part}").clone() for part in ("low", "high"))
        return HeadStats(*bounds)

    def _set_label(self, tensors: list[torch.Tensor]) -> None:
        """Point the observers at the range of this call's timestep.

        The timestep is the one input with an entry per video, or per token of it; a model without
        such an input, or with several, has all its statistics in the first range.
        """
        specs = self._observed.signature.inputs
        small = [
            tensor
            for tensor, spec in zip(tensors, specs, strict=True)
            if 1 <= len(spec.shape) <= 2 and spec.shape[0] is None
        ]
        share = float(small[0].float().amax()) / _TIMESTEPS if len(small) == 1 else 0.0
        in_range = share if math.isfinite(share) else 0.0
        index = min(self._labels - 1, max(0, int(in_range * self._labels)))
        self._observed.state[LABEL].fill_(index)

    def _check_finite(self) -> None:
        sites = self._observer_sites()
        peaks = torch.stack([self._buffer(site, "amax").amax() for site in sites])
        if bool(torch.isfinite(peaks).all()):
            return
        first = sites[int((~torch.isfinite(peaks)).int().argmax())]
        node = match.by_site(self._observed.graph)[first]
        raise CalibrationError(
            f"sample {self._calls - 1} drives NaN or infinity into this linear",
            site=str(first),
            source=match.source_line(node),
            pass_name="calibrate",
        )
