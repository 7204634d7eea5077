"""`wancompile bench`: time, memory and size of a saved model, alone or beside the original."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from wancompile.cli import artifact, calls, target
from wancompile.html import write_html
from wancompile.plan import peak_bytes
from wancompile.times import measure
from wancompile.units import nbytes, seconds

_DESCRIPTION = """\
Load a saved model and run it on random numbers: the time from loading to the
first output, the time of a forward after that, peak memory, bytes on disk.
With --against, the original is measured after it, as diffusers runs it and
uncompiled, on the same numbers in the same process.

Peak memory is that of the GPU. On a CPU it is the largest resident size of the
process so far, which tells nothing of what is measured second.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the time, memory and size of a saved model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    artifact.add_arguments(parser)
    calls.add_size(parser)
    parser.add_argument(
        "--runs",
        type=target.positive,
        default=5,
        metavar="N",
        help="forwards to take the median of (default: 5)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page with the time of each part of the model, a page for each transformer; "
        "without --against it shows blocks only as they are after compiling",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


@dataclass(frozen=True)
class Figures:
    """What was measured of one model.

    `first_output` is the time from the start of loading to the first output, `forwards` are those
    of the forwards after it, all in seconds. `peak` is the most bytes in use at once, None where
    that is not known, and `disk` the bytes of the model's files.
    """

    name: str
    first_output: float
    forwards: tuple[float, ...]
    peak: int | None
    disk: int

    @property
    def median(self) -> float:
        """The median time of a forward in seconds."""
        return statistics.median(self.forwards)


def run(args: argparse.Namespace) -> None:
    """Measure every model of the artifact, one in memory at a time."""
    found = {}
    for part, folder in artifact.parts(args.artifact).items():
        name = part or folder.resolve().name
        page = None if args.report is None else artifact.page(args.report, part)
        place = None if args.against is None else artifact.original_folder(args.against, part)
        saved, call, made = _saved(folder, name, args, page, place)
        found[name] = [saved]
        print(f"{name} on {args.device}: {calls.describe(call)}", file=sys.stderr)
        if place is not None:
            found[name].append(_original(place, made, call, args.runs))
    if args.json:
        print(json.dumps({name: [asdict(one) for one in both] for name, both in found.items()}))
        return
    print("\n\n".join(as_text(name, both) for name, both in found.items()))


def _saved(
    folder: Path, name: str, args: argparse.Namespace, page: Path | None, original: Path | None
) -> tuple[Figures, dict[str, Tensor], artifact.Made]:
    """Measure a saved model; return with it the call and what it was made of."""
    begun = _begin()
    model = artifact.load_model(folder, device=args.device)
    call = calls.random_call(model, 0, args.size)
    first, forwards = _times(model, call, begun, args.runs)
    peak = _peak(model.device) or peak_bytes()
    disk = artifact.size_on_disk(folder)
    found = Figures(model.report.recipe.name, first, forwards, peak, disk)
    made = artifact.Made.of(model)
    if page is not None:
        measured = measure(model.program, call, runs=args.runs)
        before = () if original is None else (artifact.original_program(original, made),)
        programs = (*before, model.program)
        write_html(page, model.report, programs=programs, measured=measured, title=name)
        print(f"wrote {page}", file=sys.stderr)
    return found, call, made


def _original(folder: Path, made: artifact.Made, call: Mapping[str, Tensor], runs: int) -> Figures:
    """Measure the original on the same call."""
    device = next(iter(call.values())).device
    begun = _begin()
    model = artifact.original(folder, made, device)
    first, forwards = _times(model, call, begun, runs)
    name = f"original, {str(made.dtype).removeprefix('torch.')}"
    return Figures(name, first, forwards, _peak(device), artifact.size_on_disk(folder))


def _begin() -> float:
    """Let go of what was measured before, and start the clock."""
    gc.collect()  # graphs and their modules are tied in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def _times(
    model: torch.nn.Module, call: Mapping[str, Tensor], begun: float, runs: int
) -> tuple[float, tuple[float, ...]]:
    """Return the seconds from `begun` to the first output, and those of `runs` more forwards."""
    ends = [begun]
    for _ in range(runs + 1):
        with torch.no_grad():
            model(**call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    first, *others = (end - start for start, end in itertools.pairwise(ends))
    return first, tuple(others)


def _peak(device: torch.device) -> int | None:
    """Return the most bytes in use at once on a GPU since `_begin`, None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def as_text(name: str, both: Sequence[Figures]) -> str:
    """Return a table of one model, or of it, its original and their ratios."""
    rows = [_row(one) for one in both]
    if len(both) == 2:
        rows.append(_ratios(*both))
    headers = [name, "forward", "range", "load to output", "peak memory", "on disk"]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _row(one: Figures) -> list[str]:
    spread = f"{seconds(min(one.forwards))} - {seconds(max(one.forwards))}"
    peak = "-" if one.peak is None else nbytes(one.peak)
    return [
        one.name,
        seconds(one.median),
        spread,
        seconds(one.first_output),
        peak,
        nbytes(one.disk),
    ]


def _ratios(saved: Figures, original: Figures) -> list[str]:
    """Return a row of how many times less the saved model takes."""
    peak = "-"
    if saved.peak and original.peak:
        peak = f"{original.peak / saved.peak:.2f} x"
    return [
        "faster, smaller",
        f"{original.median / saved.median:.2f} x",
        "",
        f"{original.first_output / saved.first_output:.2f} x",
        peak,
        f"{original.disk / saved.disk:.2f} x",
    ]
