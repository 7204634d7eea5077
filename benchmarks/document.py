"""BENCHMARKS.md, from all raw results that there are.

    python -m benchmarks.document > BENCHMARKS.md

Quality, what compiling and saved models cost, and speed: each part has a module that writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import (
    accuracy_attention,
    accuracy_limits,
    accuracy_table,
    exhaustive,
    h100_figures,
    h100_table,
    lora,
    lora_accuracy,
    record,
)
from benchmarks.h100_plan import ROWS

_QUALITY = """\
`python -m benchmarks.accuracy`, {gpu}: {count} prompts and seeds of each trained checkpoint,
{steps} steps with guidance, against the checkpoint in float32 from the same noise. Errors of one
step are of one call in {every}. Worst is the mean of the worst 5 %. Rows that begin with bf16
are of the whole model in bf16, as it is run. In all others only the linears of the blocks are in
8 bits, and self-attention where they say so; all else is in float32, but for what torchao's fp8
linears read and yield, bf16; so that what is compared is the rounding to 8 bits alone. bf16's
own is as large, which its row shows."""
_ATTENTION = """\
`python -m benchmarks.attention_accuracy`, in float32 with the roundings of self-attention
simulated and all linears exact: relative L2 error of one step, of {videos} held-out videos and
one call in {every} of {steps} steps. So few calls tell large effects from none, not 5 % from 0.
Each line compares two ways that differ by one choice, or, where it says so, whole recipes.
Turning q and k (Hadamard) spares a third of their error in int8, a scale for each query a fifth
to a quarter, at no cost, as it is a factor of a row of logits. A scale for each key spares less
and would be multiplied in column by column, so there is none. In e4m3 q and k err more than all
else together; weights and values in bf16 spare two fifths to a half of what is left.
**Subtracting the middle of the keys buys nothing on these models**, -9 to +13 %: within what two
videos can tell; presumably as they come out of a norm and lie around zero. Here it is always
subtracted. The compiler does so only where it narrows keys of calls that did not choose it, for
models whose keys lie elsewhere (`tests/test_quantize_attention.py` has one)."""
_CALIBRATION = """\
`python -m benchmarks.calibration`, {gpu}: {preset}, all layers, {calls} observed forwards, random
weights in bf16 on the host, {recipe}. Memory of the device is all there is, weights that come and
go and activations included; that of the host is beyond the weights, and falls as 8 bits take their
place."""
_SEARCH = """\
`python -m benchmarks.exhaustive`: error of the smooth scale that was searched for over that of
the best of {points} x {points} exponents for every pair of spans, on the tokens that both looked
at and on held-out ones; means and worst groups, and the seconds that a search took on one thread
of a CPU. The worst two held-out ratios, 1.53 and 1.24, are of one group that reads 13 words of
text: what wins by 7 of them is chance on the other 6. In fp8 its scale errs more than none there
(2.15 % and 1.71 %), so that it is not kept; in int8 it errs by 0.87 %, where none does by 30 %."""
_ARTIFACT = """\
`python -m benchmarks.artifact`, {gpu}: {preset}, all layers, random weights, {recipe}, one call at
full size. Times of a second process, which imports everything first; the files lie in the host's
memory."""
_LORA = """\
`python -m benchmarks.lora --ranks {ranks}`, {gpu}: {title}, a LoRA on every linear of every block,
random weights; the time of a layer over that without, taking turns in one run. The first load
lowers the program of three layers anew, the next one into the same room only copies."""
_LORA_ERRORS = """\
`python -m benchmarks.lora_accuracy`: errors of the trained checkpoint with outlier channels, over
all calls of held-out videos, from the float32 model with the same random LoRA, a tenth of each
weight, over the error of the compiled model without any; mean and worst of {draws} draws. Merging
rounds weights to nearest, while those without a LoRA were rounded by GPTQ where that paid: that is
what a branch keeps."""
_MEANING = {
    "plain_forward_s": "a forward of the model as it is, s",
    "observed_forward_s": "an observed one, weights coming and going, s",
    "seconds_beyond_forwards": "all of compiling beyond the model's own forwards, s",
    "activations_gib": "activations of a plain forward, device, GiB",
    "device_gib_beyond_activations": "device beyond them, GiB",
    "host_gib": "host beyond the weights, GiB",
    "bf16_gib": "weights in bf16, GiB",
    "disk_gib": "on disk, GiB",
    "disk_over_bf16": "on disk over bf16",
    "compile_s": "compile, one short call of data, s",
    "save_s": "save, s",
    "import_s": "a new process until it has imported everything, s",
    "load_s": "load to the device, s",
    "first_call_s": "first call, s",
    "second_call_s": "second call, s",
    "weights_gib": "weights on the device, GiB",
    "peak_gib": "peak of a call, GiB",
    "two_experts_peak_gib": "peak of a call with two such models there, GiB",
    "two_experts_over_bf16": "that over the weights of two in bf16",
}


def document(folder: Path) -> str:
    """Return the whole document as Markdown, of the results in `folder`."""
    speed = sorted(folder.glob("h100-*.json"))
    cells, surroundings = h100_figures.load(speed)
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.document` from the raw results in `benchmarks/results/`.",
        *_quality(folder),
        *_search(folder),
        *_calibration(folder),
        *_artifact(folder),
        *_loras(folder),
        h100_table.document(cells, surroundings),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _quality(folder: Path) -> list[str]:
    found = [_read(path) for path in sorted(folder.glob("accuracy-*.json"), reverse=True)]
    if not found:
        return []
    gpu = found[0]["measured_on"]["gpu"] or "CPU"
    settings = found[0]["settings"]
    results = [one["results"] for one in found]
    how = _QUALITY.format(gpu=gpu, **settings)
    tables = accuracy_table.document(results)
    limits = accuracy_limits.document(results)
    return ["## Quality", how, tables, *limits, *_attention(folder)]


def _attention(folder: Path) -> list[str]:
    found = _results(folder, "attention_accuracy")
    if found is None:
        return []
    about = _ATTENTION.format(**found["settings"])
    return ["### Self-attention in 8 bits", about, accuracy_attention.document(found["results"])]


def _search(folder: Path) -> list[str]:
    found = _results(folder, "exhaustive")
    if found is None:
        return []
    table = exhaustive.table(found["results"], "github")
    return ["## Search for smooth scales", _about(_SEARCH, found), table]


def _calibration(folder: Path) -> list[str]:
    found = _results(folder, "calibration")
    if found is None:
        return []
    steps = [
        (one["step"], one["seconds"], one["device_gib"], one["host_gib"])
        for one in found["results"]["steps"]
    ]
    headers = ("step", "seconds", "device, GiB", "host, GiB")
    table = tabulate(steps, headers, tablefmt="github", floatfmt=".2f")
    summary = _facts(found["results"]["summary"])
    return ["## What compiling costs", _about(_CALIBRATION, found), summary, table]


def _artifact(folder: Path) -> list[str]:
    found = _results(folder, "artifact")
    if found is None:
        return []
    facts = dict(found["results"])
    facts["two_experts_over_bf16"] = facts["two_experts_peak_gib"] / (2 * facts["bf16_gib"])
    return ["## Saved models", _about(_ARTIFACT, found), _facts(facts)]


def _loras(folder: Path) -> list[str]:
    parts = []
    found = _results(folder, "lora")
    if found is not None:
        settings = found["settings"]
        how = _LORA.format(
            gpu=found["measured_on"]["gpu"],
            title=ROWS[settings["row"]].title,
            ranks=" ".join(map(str, settings["ranks"])),
        )
        parts += [how, lora.table(found["results"], "github")]
    found = _results(folder, "lora_accuracy")
    if found is not None:
        how = _LORA_ERRORS.format(**found["settings"])
        parts += [how, lora_accuracy.table(found["results"], "github")]
    return ["## LoRAs", *parts] if parts else []


def _about(text: str, found: dict[str, Any]) -> str:
    return text.format(gpu=found["measured_on"]["gpu"], **found["settings"])


def _facts(figures: dict[str, float]) -> str:
    rows = [(text, figures[name]) for name, text in _MEANING.items() if name in figures]
    return tabulate(rows, ("", ""), tablefmt="github", floatfmt=".2f")


def _results(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the raw results of a benchmark, None where it was not run."""
    path = folder / f"{name}.json"
    return _read(path) if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.stdout.write(document(record.RESULTS))
