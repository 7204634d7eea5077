"""Stats: what calibration learned, mergeable and saved as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wancompile.errors import CalibrationError
from wancompile.ir.site import Site
from wancompile.quant import lines, stability
from wancompile.quant.stability import Stability

FORMAT = "wancompile-stats-4"


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Statistics of one producer value `[..., C]`, on N lines; see `wancompile/quant/lines.py`.

    `amax [N, C]` fp32: largest magnitude per channel; `count [N]` int64: distinct rows seen;
    `sample [R, C]`: a uniform sample of distinct rows, `priority [R]` fp64 ascending; rows of
    infinite priority are places still empty.
    """

    amax: Tensor
    count: Tensor
    sample: Tensor
    priority: Tensor

    @property
    def tokens(self) -> Tensor:
        """The sampled rows, at most R."""
        return self.sample[torch.isfinite(self.priority)]

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Return the statistics of both data sets together, as if seen by one observer.

        Of samples of different sizes the smaller decides: beyond it, rows of the other data set
        would be missing.
        """
        limit = min(len(self.priority), len(other.priority))
        priority, order = torch.cat([self.priority, other.priority]).sort()
        sample = torch.cat([self.sample, other.sample])[order]
        return ChannelStats(
            torch.maximum(self.amax, other.amax),
            self.count + other.count,
            sample[:limit],
            priority[:limit],
        )


@dataclass(frozen=True, eq=False)
class HeadStats:
    """The range of one attention operand `[B, H, S, D]`, on M lines, see `ChannelStats`.

    Of q and k it is that of the Hadamard transform where D is a power of two.

    `low` and `high`, both `[M, H, D]` fp32: smallest and largest value per channel; +infinity and
    -infinity where nothing was seen.
    """

    low: Tensor
    high: Tensor

    def merge(self, other: HeadStats) -> HeadStats:
        """Return the statistics of both data sets together."""
        return HeadStats(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    @property
    def amax(self) -> Tensor:
        """The largest magnitude per channel over all timesteps, `[H, D]`."""
        return torch.maximum(self.high.amax(0), -self.low.amin(0))

    @property
    def middle(self) -> Tensor:
        """The middle of the range per channel over all timesteps, `[H, D]`."""
        return (self.high.amax(0) + self.low.amin(0)) / 2

    @property
    def half_width(self) -> Tensor:
        """Half the width of the range per channel over all timesteps, `[H, D]`."""
        return (self.high.amax(0) - self.low.amin(0)) / 2


@dataclass(frozen=True, eq=False)
class Stats:
    """Everything calibration learned about a model.

    `channels` is keyed by the observer site of a group, `heads` by the site of an attention and
    the operand (`"q"`, `"k"`, `"v"`). `edges` are the L + 1 bounds of the timestep ranges, `calls`
    the number of forwards, `seeds` those that drew the samples.

    `tally` counts the calls on each of the N lines of `channels`, and is empty where that is not
    known. `roles` says what is done with the value that a site of `channels` observes. `timesteps`
    are the smallest and the largest one seen, by which the experts of a model differ; None where a
    model has none. `model` is a digest of the weights, empty where it is not known.
    """

    channels: Mapping[Site, ChannelStats]
    heads: Mapping[tuple[Site, str], HeadStats] = field(default_factory=dict)
    edges: tuple[float, ...] = (0.0, 1000.0)
    calls: int = 0
    seeds: tuple[int, ...] = ()
    tally: tuple[int, ...] = ()
    roles: Mapping[Site, str] = field(default_factory=dict)
    timesteps: tuple[float, float] | None = None
    model: str = ""

    def calls_of(self, label: str) -> int:
        """Return the number of calls of the kind `label`: "cond", "uncond" or "", any other."""
        ranges, kind = len(self.edges) - 1, lines.KINDS.index(label)
        starts = (lines.line_of(half, kind, 0, ranges) for half in range(lines.HALVES))
        return sum(sum(self.tally[start : start + ranges]) for start in starts)

    def stability(self) -> Stability:
        """Return how much two halves of the calls differ, and whether there were enough."""
        return stability.of(self)

    def merge(self, other: Stats) -> Stats:
        """Return the statistics of both runs together.

        Raises:
            CalibrationError: the runs observed other sites, ranges or weights (the experts of one
                model differ in nothing else), or drew with the same seed, which would sample the
                same positions twice.
        """
        if self.edges != other.edges or _shapes(self) != _shapes(other):
            raise CalibrationError("statistics of different models or ranges cannot be merged")
        if self.model and other.model and self.model != other.model:
            raise CalibrationError(
                "statistics of different models cannot be merged: their weights differ"
            )
        if set(self.seeds) & set(other.seeds):
            raise CalibrationError("both runs drew with the same seed: give each its own")
        return Stats(
            {site: mine.merge(other.channels[site]) for site, mine in self.channels.items()},
            {key: mine.merge(other.heads[key]) for key, mine in self.heads.items()},
            self.edges,
            self.calls + other.calls,
            self.seeds + other.seeds,
            _added(self.tally, other.tally),
            self.roles or other.roles,
            _spanned(self.timesteps, other.timesteps),
            self.model or other.model,
        )

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the statistics to `path` as safetensors, with `notes` for `load_notes`.

        Whoever reads `path` meanwhile, or after a crash, finds the old file or the new one whole.
        """
        tensors = {}
        for site, one in self.channels.items():
            for name in ("amax", "count", "sample", "priority"):
                tensors[f"channels/{site}/{name}"] = getattr(one, name).cpu().contiguous()
        for (site, operand), head in self.heads.items():
            tensors[f"heads/{site}/{operand}/low"] = head.low.cpu().contiguous()
            tensors[f"heads/{site}/{operand}/high"] = head.high.cpu().contiguous()
        facts = {
            "edges": self.edges,
            "calls": self.calls,
            "seeds": self.seeds,
            "tally": self.tally,
            "roles": {str(site): role for site, role in self.roles.items()},
            "timesteps": self.timesteps,
            "model": self.model,
        }
        metadata = {"format": FORMAT, "facts": json.dumps(facts), **(notes or {})}
        _replace(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read statistics written by `save`.

        Raises:
            CalibrationError: the file is not one of ours, or of another format.
        """
        metadata, tensors = _read(Path(path))
        try:
            facts = json.loads(metadata["facts"])
            return cls(_channels(tensors), _heads(tensors), **_known(facts))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{path} is incomplete: {error!r}") from error


def load_notes(path: str | Path) -> Mapping[str, str]:
    """Return what `Stats.save` wrote beside the statistics; raises what `Stats.load` raises."""
    metadata, _ = _read(Path(path), with_tensors=False)
    return {name: text for name, text in metadata.items() if name not in ("format", "facts")}


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Stats` that are not tensors, in their types."""
    steps = facts["timesteps"]
    return {
        "edges": tuple(facts["edges"]),
        "calls": int(facts["calls"]),
        "seeds": tuple(facts["seeds"]),
        "tally": tuple(facts["tally"]),
        "roles": {Site.parse(site): role for site, role in facts["roles"].items()},
        "timesteps": None if steps is None else (float(steps[0]), float(steps[1])),
        "model": str(facts["model"]),
    }


def _read(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise CalibrationError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CalibrationError(f"{path} holds no statistics of format {FORMAT}")
    return metadata, tensors


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(unfinished), metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _added(mine: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sums; nothing where either is unknown."""
    return tuple(a + b for a, b in zip(mine, other, strict=True)) if mine and other else ()


def _spanned(
    mine: tuple[float, float] | None, other: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Return the interval that covers both."""
    if mine is None or other is None:
        return mine or other
    return min(mine[0], other[0]), max(mine[1], other[1])


def _shapes(stats: Stats) -> tuple[dict[Site, torch.Size], dict[tuple[Site, str], torch.Size]]:
    """Return the shapes of everything whose size the model decides."""
    channels = {site: one.amax.shape for site, one in stats.channels.items()}
    return channels, {key: one.low.shape for key, one in stats.heads.items()}


def _channels(tensors: Mapping[str, Tensor]) -> dict[Site, ChannelStats]:
    names = {
        name.removeprefix("channels/").rpartition("/")[0]
        for name in tensors
        if name.startswith("channels/")
    }
    parts = ("amax", "count", "sample", "priority")
    return {
        Site.parse(name): ChannelStats(*(tensors[f"channels/{name}/{part}"] for part in parts))
        for name in sorted(names)
    }


def _heads(tensors: Mapping[str, Tensor]) -> dict[tuple[Site, str], HeadStats]:
    found = {}
    for name, low in tensors.items():
        if name.startswith("heads/") and name.endswith("/low"):
            key = name.removesuffix("/low")
            site, _, operand = key.removeprefix("heads/").rpartition("/")
            found[Site.parse(site), operand] = HeadStats(low, tensors[f"{key}/high"])
    return found
