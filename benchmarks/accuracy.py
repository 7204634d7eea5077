"""How near the videos of quantized models are to the originals, and whether they show the same.

    python -m benchmarks.accuracy [t2v i2v] [--count 50] [--budget 240]

Each trained checkpoint, as it is and with outlier channels, makes the same videos by every column:
in floating point, quantized by peers, and by ours. All are compared with the checkpoint in float32,
and all are calibrated on the same calls of the schedule that is sampled with, as a user would.

- one-step error: relative L2 distance of the model's output, on calls of the float32 model that
  nothing was calibrated on;
- of automatic recipes, which bound it, also that of the worst call of each video;
- PSNR, SSIM and temporal error of the final videos, and what a classifier sees in them.

Every subject runs in a process of its own and writes its results after every column. Columns for
which `--budget` leaves no time, and those that cannot run here, are named with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import accuracy_table, record, subjects
from benchmarks.accuracy_columns import COLUMNS, Column, Subject, Unavailable, cast
from training.classifier import Classifier
from wancompile.demo.quality import psnr, ssim, temporal_error
from wancompile.demo.sampler import Request, sample

KINDS = ("plain", "outliers")
# The options by which the figures of columns can be compared.
_COMPARED = ("count", "steps", "every", "calibration_videos", "calibration_steps")
Calls = Sequence[Mapping[str, Any]]
_MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "temporal": temporal_error,
}


class Reference:
    """What a checkpoint in float32 makes of the held-out requests: videos, and calls on the way."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.asked, self.labels = subjects.held_out(name, options.count, options.steps)
        self.batch = options.batch
        self.model = subjects.load(name)
        seen: list[dict[str, Any]] = []
        hook = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
        )
        self.videos = in_batches(self.model, self.asked, self.batch)
        hook.remove()
        size = len(seen) // -(-options.count // options.batch)
        self.calls = [
            seen[start : start + size : options.every] for start in range(0, len(seen), size)
        ]
        self.outputs = [outputs(self.model, batch) for batch in self.calls]
        self._classifier = Classifier()

    def compare(self, model: Any) -> dict[str, Any]:
        """Return the figures of one column, each with its value for every video.

        Raises:
            ValueError: the model yields NaN, or the original videos bit by bit; JSON has neither
                NaN nor an infinite PSNR.
        """
        found = {"one_step": accuracy_table.spread("one_step", self._one_step(model))}
        videos = in_batches(model, self.asked, self.batch)
        for name, measure in _MEASURES.items():
            found[name] = accuracy_table.spread(name, measure(videos, self.videos))
        broken = [name for name, figure in found.items() if not math.isfinite(figure["mean"])]
        if broken:
            raise ValueError(f"{', '.join(broken)}: not finite, for NaN or for being the original")
        return {**found, **self.named(videos)}

    def named(self, videos: Tensor) -> dict[str, Any]:
        """Return which digits the videos show, and the share of those that were asked for."""
        named = self._classifier(videos)
        return {"recognised": float((named == self.labels).float().mean()), "named": named.tolist()}

    def _one_step(self, model: Any) -> Tensor:
        """Return the relative L2 error for each video, over its calls together."""
        pairs = zip(self.calls, self.outputs, strict=True)
        return torch.cat([_errors(outputs(model, batch), expected) for batch, expected in pairs])

    def worst_call(self, model: Any) -> Tensor:
        """Return for each video the relative L2 error of its worst call, as budgets bound it."""
        found = []
        for batch, expected in zip(self.calls, self.outputs, strict=True):
            pairs = zip(outputs(model, batch), expected, strict=True)
            found.append(torch.stack([_errors([a], [e]) for a, e in pairs]).amax(0))
        return torch.cat(found)


def _errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    pairs = zip(actual, expected, strict=True)
    lost = torch.stack([_squares(a - e) for a, e in pairs]).sum(0)
    return (lost / torch.stack([_squares(e) for e in expected]).sum(0)).sqrt()


def _squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def in_batches(model: Any, asked: Request, size: int) -> Tensor:
    """Return the videos of a request, sampled `size` at a time."""
    starts = range(0, len(asked.prompts), size)
    return torch.cat([sample(model, subjects.part(asked, start, size)) for start in starts])


def outputs(model: Any, data: Calls) -> list[Tensor]:
    """Return in fp64 what `model`, in whatever type, predicts on each call."""
    with torch.no_grad():
        calls = ({**cast(call, model.dtype), "return_dict": False} for call in data)
        return [model(**call)[0].double() for call in calls]


def measure(name: str, kind: str, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Measure the columns of one subject and write after each; return everything."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = Reference(name, options)
    model = reference.model if kind == "plain" else subjects.with_outliers(reference.model)
    steps = options.calibration_steps or options.steps
    shown = subjects.calibration(name, options.calibration_videos, steps)
    subject = Subject(
        model, subjects.alternating(model, shown), is_reference=model is reference.model
    )
    found: dict[str, Any] = {
        "checkpoint": name,
        "kind": kind,
        "asked": reference.labels.tolist(),
        "original": reference.named(reference.videos),
        "columns": kept(name, kind, options) if options.keep else {},
    }
    budget = record.Budget(deadline - time.time())
    for column in COLUMNS:
        if column.name in options.columns:
            found["columns"][column.name] = _figures(column, subject, reference, budget)
            record.write(options.out, part_name(name, kind), record.settings(options), found)
            print(
                name, kind, accuracy_table.line(found["columns"][column.name], column), flush=True
            )
    return found


def kept(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is in `options.out` of columns that are not to be measured.

    Raises:
        ValueError: it was measured with other settings.
    """
    columns = record.kept(options, part_name(name, kind), _COMPARED)["columns"]
    return {key: one for key, one in columns.items() if key not in options.columns}


def _figures(
    column: Column, subject: Subject, reference: Reference, budget: record.Budget
) -> dict[str, Any]:
    if not budget.allows():
        return {"left_out": "no time was left"}
    with budget.spend():
        started = time.perf_counter()
        try:
            model = column.make(subject)
            made = time.perf_counter()
            figures = reference.compare(model)
        except Unavailable as error:
            return {"left_out": str(error)}
        except Exception as error:  # whatever peers raise: the other columns are still wanted
            return {"failed": f"{type(error).__name__}: {error}"}
    figures["seconds"] = {"make": made - started, "run": time.perf_counter() - made}
    choice = getattr(getattr(model, "report", None), "choice", None)
    if choice is None:
        return figures
    worst = accuracy_table.spread("one_step", reference.worst_call(model))
    return {**figures, "worst_call": worst, "note": str(choice)}


def part_name(name: str, kind: str) -> str:
    """Return the name of the results of one subject."""
    return f"accuracy-{name}-{kind}"


def _all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the results of every subject; several run side by side if asked to."""
    deadline = time.time() + options.budget
    chosen = list(itertools.product(options.names, options.kinds))
    if options.jobs == 1:
        yield from (measure(*one, options, deadline) for one in chosen)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        running = [pool.submit(measure, *one, options, deadline) for one in chosen]
        yield from (one.result() for one in running)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print; exit with 1 if a column failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [column.name for column in COLUMNS]
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--columns", nargs="+", default=names, choices=names, metavar="COLUMN")
    parser.add_argument("--count", type=int, default=50, help="videos, digit after digit")
    parser.add_argument("--batch", type=int, default=50, help="videos sampled at a time")
    parser.add_argument("--steps", type=int, default=Request(()).steps)
    parser.add_argument(
        "--every", type=int, default=5, help="calls from one that counts to the next"
    )
    parser.add_argument("--calibration-videos", type=int, default=4)
    parser.add_argument("--calibration-steps", type=int, help="as many as --steps if not given")
    parser.add_argument(
        "--keep", action="store_true", help="keep what --out has of columns not measured now"
    )
    parser.add_argument("--jobs", type=int, default=1, help="subjects that run side by side")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    results = list(_all(options))
    print(accuracy_table.document(results))
    if any("failed" in one for found in results for one in found["columns"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
