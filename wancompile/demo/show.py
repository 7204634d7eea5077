"""The demonstration from start to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

import wancompile
from wancompile import Report, Stats
from wancompile.compiled import CompiledModel
from wancompile.demo import checkpoints
from wancompile.demo.animation import difference, side_by_side
from wancompile.demo.conditions import prompt
from wancompile.demo.quality import psnr, ssim
from wancompile.demo.sampler import Request, calls, sample
from wancompile.gate.compare import compare
from wancompile.html import Extras, Picture, Table, write_html
from wancompile.units import nbytes

RECIPES = ("fp8", "int8")
# Enough to find the channels that stand out, on digits and seeds that the demo does not show.
_CALIBRATION_STEPS, _CALIBRATION_SEED, _CALIBRATION_VIDEOS = 8, 1000, 3
_GAIN = 10.0


@dataclass(frozen=True)
class Compared:
    """A compiled model beside the original: its report, and how near its video came."""

    report: Report
    video: Tensor
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Result:
    """What the demo made: videos `[1, 1, 9, 24, 24]` in [-1, 1], by recipe, and the files."""

    original: Tensor
    compared: Mapping[str, Compared]
    files: tuple[Path, ...] = field(default=())


def run(
    out: Path,
    *,
    model: checkpoints.Name = "t2v",
    digit: int = 7,
    steps: int = 16,
    seed: int = 0,
    echo: Callable[[str], None] = print,
    progress: bool = True,
) -> Result:
    """Compile a trained model in fp8 and int8, compare the videos, and write a folder.

    Args:
        out: the folder; it gets `report.html`, `report-fp8.html` and `side-by-side.gif`.
        model: "t2v" or "i2v".
        digit: what the video shows, 0 to 9.
        steps: sampling steps of each video.
        seed: of the first noise.
        echo: what to do with a line of text.
        progress: whether to show progress bars.
    """
    started = time.perf_counter()
    original = checkpoints.load(model)
    asked = _request(model, (digit,), steps, seed)
    parameters = sum(one.numel() for one in original.parameters())
    echo(f"{model}: {parameters / 1e6:.1f} M parameters, asked for {asked.prompts[0]!r}")
    expected = sample(original, asked, progress="original" if progress else "")
    stats = _calibrate(original, model, digit, progress)
    example = calls(original, [_request(model, (digit,), 1, seed)])[0]
    compiled: dict[str, CompiledModel] = {}
    compared: dict[str, Compared] = {}
    for recipe in RECIPES:
        echo(f"compiling to {recipe}")
        compiled[recipe] = wancompile.compile(
            original, recipe=recipe, stats=stats, example_inputs=example
        )
        video = sample(compiled[recipe], asked, progress=recipe if progress else "")
        compared[recipe] = _compared(compiled[recipe].report, video, expected)
    echo("\n" + _tables(compared))
    result = Result(expected, compared)
    files = _write(out, original, compiled, result, example, f"{model}, {asked.prompts[0]}")
    seconds = time.perf_counter() - started
    echo(f"\nwrote {', '.join(map(str, files))} after {seconds:.0f} s")
    return Result(expected, compared, files)


def _request(model: checkpoints.Name, digits: tuple[int, ...], steps: int, seed: int) -> Request:
    frames = None
    if model == "i2v":
        frames = torch.cat([checkpoints.first_frame(digit) for digit in digits])
    return Request(tuple(map(prompt, digits)), frames, steps=steps, seed=seed)


def _calibrate(
    original: torch.nn.Module, model: checkpoints.Name, digit: int, progress: bool
) -> Stats:
    others = tuple((digit + step) % 10 for step in range(1, 10, 10 // _CALIBRATION_VIDEOS))
    request = _request(model, others[:_CALIBRATION_VIDEOS], _CALIBRATION_STEPS, _CALIBRATION_SEED)
    bar = "calibration" if progress else ""
    return wancompile.calibrate(original, lambda: sample(original, request, progress=bar))


def _compared(report: Report, video: Tensor, expected: Tensor) -> Compared:
    return Compared(report, video, float(psnr(video, expected)), float(ssim(video, expected)))


# What is shown --------------------------------------------------------------------------------

_ROLE_HEADERS = (
    "role",
    "groups",
    "1/s goes to",
    *(f"{recipe} {state}" for recipe in RECIPES for state in ("plain", "smoothed")),
)
_VIDEO_HEADERS = ("model", "PSNR", "SSIM", "weights", "of the original")


def _tables(compared: Mapping[str, Compared]) -> str:
    return "\n\n".join(
        str(tabulate(rows, headers=headers, disable_numparse=True))
        for headers, rows in (
            (_ROLE_HEADERS, _role_rows(compared)),
            (_VIDEO_HEADERS, _video_rows(compared)),
        )
    )


def _role_rows(compared: Mapping[str, Compared]) -> list[list[object]]:
    """One row a role: mean error of its groups' outputs per recipe, without and with smoothing."""
    rows = []
    for summaries in zip(*(one.report.roles for one in compared.values()), strict=True):
        first = summaries[0]
        errors = [e for one in summaries for e in (one.error_plain, one.error_smoothed)]
        shown = ["-" if error is None else f"{100 * error:.2f} %" for error in errors]
        rows.append([str(first.role), first.groups, ", ".join(first.folds), *shown])
    return rows


def _video_rows(compared: Mapping[str, Compared]) -> list[list[object]]:
    before = next(iter(compared.values())).report.bytes_before
    rows: list[list[object]] = [["original, float32", "-", "-", nbytes(before), "1.00"]]
    for recipe, one in compared.items():
        after = one.report.bytes_after
        quality = (f"{one.psnr:.1f} dB", f"{one.ssim:.4f}")
        rows.append([recipe, *quality, nbytes(after), f"{after / before:.2f}"])
    return rows


def _write(
    out: Path,
    original: torch.nn.Module,
    compiled: Mapping[str, CompiledModel],
    result: Result,
    example: Mapping[str, object],
    title: str,
) -> tuple[Path, ...]:
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "side-by-side.gif"
    picture.write_bytes(_animation(result))
    extras = Extras(
        "The videos",
        tables=(
            Table("How near the videos are", _VIDEO_HEADERS, _video_rows(result.compared)),
            Table(
                "Errors by role",
                _ROLE_HEADERS,
                _role_rows(result.compared),
                "Relative L2 error of the groups' outputs on calibration tokens held out.",
            ),
        ),
        pictures=(Picture("The same noise through each model", "image/gif", picture.read_bytes()),),
    )
    normal = wancompile.trace(original, example)
    pages = []
    for recipe, model in compiled.items():
        name = "report.html" if recipe == RECIPES[-1] else f"report-{recipe}.html"
        pages.append(
            write_html(
                out / name,
                model.report,
                programs=(normal, model.program),
                comparison=compare(normal, model.program, example),
                extras=extras,
                title=title,
            )
        )
    return (*pages, picture)


def _animation(result: Result) -> bytes:
    reference = result.original[0, 0]
    panels = {"original": reference}
    panels |= {recipe: one.video[0, 0] for recipe, one in result.compared.items()}
    for recipe, one in result.compared.items():
        panels[f"{recipe} - original, x{_GAIN:.0f}"] = difference(one.video[0, 0], reference, _GAIN)
    return side_by_side(panels)
