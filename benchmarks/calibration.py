"""What it costs to calibrate and compile a whole model, beside its own forwards.

    python -m benchmarks.calibration --preset t2v-14b --calls 32 --device cuda

The model has random bf16 weights, which serve for cost and say nothing about errors. Its forwards
are timed as they are; then the weights move to the host, unless `--weights device` leaves them, and
the model is exported, calibrated and compiled step by step. The gate is left out: its forwards are
as many as its calls. Each step has its seconds and its peaks of memory, of the device beyond the
weights that are there (activations included) and of the host beyond the weights. The JSON is
written after every step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import record
from benchmarks.calibration_observers import observers
from benchmarks.h100_model import build, clear, seconds, synchronize
from benchmarks.h100_plan import Row
from wancompile import passes, pipeline, presets
from wancompile.calibrate import Calibration
from wancompile.export import export
from wancompile.program import Program
from wancompile.quant.lines import KINDS
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve
from wancompile.stream import place

GIB = 1 << 30
_NAME = "calibration"
# Not a part of compiling a model: made or run to be compared with.
_APART = ("build", "plain forwards", "to the host", "unobserved forwards", "second call")


class Steps:
    """Times steps and watches memory while they run.

    `results` grows by a line for each step; `base` is what of the device and of the host is not
    counted, in bytes.
    """

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.results: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self._device = device
        self._options = options
        self.base = (0, 0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what is done inside; what is put into the dict stands beside the figures."""
        clear(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        line: dict[str, Any] = {"step": name}
        peak = _HostPeak()
        started = time.perf_counter()
        with peak:
            yield line
            synchronize(self._device)
        line["seconds"] = time.perf_counter() - started
        line["device_gib"] = (self._device_peak() - self.base[0]) / GIB
        line["host_gib"] = (peak.bytes - self.base[1]) / GIB
        self.results.append(line)
        print(_table([line], headers=()), flush=True)
        self.write()

    def write(self) -> Path:
        """Write what has been measured so far."""
        found = {"steps": self.results, **self.facts}
        return record.write(self._options.out, _NAME, record.settings(self._options), found)

    def _device_peak(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.max_memory_allocated(self._device))


class _HostPeak:
    """The most memory that this process holds while the context is open."""

    def __enter__(self) -> None:
        self.bytes = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Return the bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


def measure(options: argparse.Namespace) -> Steps:
    """Run all steps on one model."""
    device = torch.device(options.device)
    steps = Steps(device, options)
    row = Row(_NAME, options.preset, _latent(options), "")
    with steps("build"):
        model = build(row, options.layers or row.layers, device, options.tiny)
    weights = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    steps.facts["weights_gib"] = weights / GIB
    calls = _calls(row, options, device)
    if device.type == "cuda":
        steps.base = (weights, 0)
    plain = _plain_forwards(steps, model, calls[: options.plain_calls], device)
    if options.weights == "host":
        with steps("to the host"):
            model.to("cpu")
            gc.collect()
        calls = [_moved(call, torch.device("cpu")) for call in calls]
        steps.base = (0, resident())
    else:
        steps.base = (steps.base[0], resident())
    _compile(steps, model, calls, options, device)
    _summarize(steps, plain, options)
    return steps


def _plain_forwards(
    steps: Steps, model: torch.nn.Module, calls: Sequence[dict[str, Any]], device: torch.device
) -> float:
    """Return the median seconds of a forward; the first one warms up."""
    each = []
    with steps("plain forwards") as line, torch.no_grad():
        for call in (calls[0], *calls):
            each.append(seconds(lambda c=call: model(**c), device))
        line["each"] = each
    return statistics.median(each[1:])


def _compile(
    steps: Steps,
    model: torch.nn.Module,
    calls: Sequence[dict[str, Any]],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    first, recipe = calls[0], resolve(options.recipe)
    probe = pipeline.Probe(first, device)
    with steps("export"):
        exported = export(model, [first])
    with steps("normalize"):
        normal = pipeline.run(exported, passes.NORMALIZE, probe=probe)
    with steps("unobserved forwards") as line:
        line["each"] = _unobserved(normal, calls[:2], device)
    stats = _calibrate(steps, normal, calls, device)
    with steps("smooth"):
        smoothed = pipeline.run(normal, passes.smoothing(recipe, stats, device), probe=probe)
    normal.release()
    exported.release()
    model.to("meta")
    gc.collect()
    _lower(steps, smoothed, recipe, stats, first, device)


def _unobserved(
    normal: Program, calls: Sequence[dict[str, Any]], device: torch.device
) -> list[float]:
    run = place(normal, device)
    return [seconds(lambda c=call: run(**c), device) for call in calls]


def _calibrate(
    steps: Steps, normal: Program, calls: Sequence[dict[str, Any]], device: torch.device
) -> Stats:
    with steps("observed forwards") as line:
        calibration = Calibration(normal, device=device)
        kinds = [KINDS[1 + index % 2] for index in range(len(calls))]
        line["each"] = [
            seconds(lambda c=call, k=kind: calibration.observe(c, k), device)
            for call, kind in zip(calls, kinds, strict=True)
        ]
    with steps("statistics"):
        stats = calibration.stats()
        steps.facts["verdict"] = stats.stability().verdict
    return stats


def _lower(
    steps: Steps,
    smoothed: Program,
    recipe: Recipe,
    stats: Stats,
    call: dict[str, Any],
    device: torch.device,
) -> None:
    with steps("quantize"):
        todo = passes.quantization(recipe, stats, device)
        quantized = pipeline.run(smoothed, todo, consume=True)
    with steps("fuse"):
        fused = pipeline.run(quantized, passes.FUSE, consume=True)
    steps.facts["compiled_gib"] = fused.nbytes / GIB
    with steps("lower"):
        lowered = pipeline.run(fused.to(device), passes.lowering(device), consume=True)
    call = _moved(call, device)
    for name in ("first call", "second call"):
        with steps(name):
            lowered(**call)


def _summarize(steps: Steps, plain: float, options: argparse.Namespace) -> None:
    """Note what all of compiling costs beyond the forwards' own time."""
    counted = [line for line in steps.results if line["step"] not in _APART]
    by_name = {line["step"]: line for line in steps.results}
    total = sum(line["seconds"] for line in counted)
    observed = statistics.median(by_name["observed forwards"]["each"])
    unobserved = by_name["unobserved forwards"]["each"][-1]
    activations = by_name["plain forwards"]["device_gib"]
    working = [line for line in counted if line["step"] not in ("lower", "first call")]
    steps.facts["summary"] = {
        "plain_forward_s": plain,
        "unobserved_forward_s": unobserved,
        "observed_forward_s": observed,
        "observers_share": observed / unobserved - 1,
        "seconds": total,
        "seconds_beyond_forwards": total - options.calls * plain,
        "activations_gib": activations,
        "device_gib_beyond_activations": max(one["device_gib"] for one in working) - activations,
        "host_gib": max(one["host_gib"] for one in working),
    }
    shape = _latent(options)
    if torch.device(options.device).type == "cuda":
        config = presets.find(options.preset).config
        steps.facts["observers"] = observers(config, shape)
    steps.write()


def _latent(options: argparse.Namespace) -> presets.Latent:
    usual = presets.find(options.preset).latent
    given = (options.frames, options.height, options.width)
    frames, height, width = (one or other for one, other in zip(given, usual, strict=True))
    return frames, height, width


def _calls(row: Row, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return calls of different noise whose timesteps go from 999 down."""
    preset = row.preset_of(1, options.tiny)
    torch.manual_seed(1)
    found = []
    for step in torch.linspace(999, 20, options.calls):
        call: dict[str, Any] = presets.example_inputs(preset, latent=row.latent, device=device)
        call["timestep"] = torch.full_like(call["timestep"], float(step))
        found.append({**call, "return_dict": False})
    return found


def _moved(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in call.items()
    }


def _table(lines: Sequence[dict[str, Any]], headers: Sequence[str]) -> str:
    rows = [
        [line["step"].ljust(20), line["seconds"], line["device_gib"], line["host_gib"]]
        for line in lines
    ]
    return tabulate(rows, headers=headers, floatfmt="8.2f", tablefmt="plain")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = _parser().parse_args(argv)
    steps = measure(options)
    print(_table(steps.results, headers=("step", "seconds", "device GiB", "host GiB")))
    print(tabulate(steps.facts["summary"].items(), floatfmt=".3f"))
    for one in steps.facts.get("observers", []):
        print(tabulate(one.items(), floatfmt=".3f", tablefmt="plain"))
    print(steps.write())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="t2v-14b")
    parser.add_argument("--layers", type=int, help="blocks; all by default")
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="of the latents; the preset's by default")
    parser.add_argument("--calls", type=int, default=32, help="observed forwards")
    parser.add_argument("--plain-calls", type=int, default=3, help="plain forwards")
    parser.add_argument("--recipe", default="int8-attention")
    parser.add_argument("--weights", choices=("host", "device"), default="host")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
