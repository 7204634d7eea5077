"""What LoRAs beside 8-bit weights, or merged into them, do to the error of a trained model.

    python -m benchmarks.lora_accuracy [t2v i2v] [--recipes int8 fp8] [--ranks 4 32] [--draws 4]

The checkpoint has outlier channels. LoRAs are random, a tenth of each weight of its blocks. Errors
are relative L2 distances, over all calls of held-out videos, from the float32 model with the same
LoRA merged into it in float64, over that of the compiled model without any from the float32 model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

import wancompile
from benchmarks import record, smoothing, subjects
from wancompile.compiled import CompiledModel
from wancompile.demo.sampler import calls

import loras  # isort: skip  # a helper of the tests, whose folder `subjects` has put on the path

WAYS = {
    "beside": "beside the weights",
    "merged": "merged, with the original",
    "merged again": "merged, without the original",
}
_NAME = "lora_accuracy"


def measure(name: str, recipe: str, ranks: Sequence[int], options: Any) -> list[dict[str, Any]]:
    """Return the ratios of all draws for one checkpoint and recipe, by rank and way."""
    model = subjects.with_outliers(subjects.load(name))
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    asked, _ = subjects.held_out(name, options.held_out_videos, options.held_out_steps)
    held_out = calls(model, [asked])
    compiled = wancompile.compile(model, shown, recipe, limits=None)
    exact = smoothing.outputs(model, held_out)
    base = smoothing.relative_error(smoothing.outputs(compiled, held_out), exact)
    found: list[dict[str, Any]] = []
    for rank in ranks:
        ratios: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(options.draws):
            lora = loras.random(model, rank, seed=seed)
            expected = smoothing.outputs(loras.with_lora(model, (1.0, lora)), held_out)
            for way in WAYS:
                one = _with(compiled, way, loras.as_peft(lora), model)
                error = smoothing.relative_error(smoothing.outputs(one, held_out), expected)
                ratios[way].append(error / base)
        found += [
            {"subject": name, "recipe": recipe, "rank": rank, "way": way, "base": base,
             "ratios": each}
            for way, each in ratios.items()
        ]  # fmt: skip
    return found


def _with(
    compiled: CompiledModel, way: str, lora: Mapping[str, Tensor], model: nn.Module
) -> CompiledModel:
    one = CompiledModel(compiled.fused, compiled.report, compiled.config, compiled.dtype)
    if way == "beside":
        one.load_lora(lora)
    else:
        one.merge_lora(lora, reference=model if way == "merged" else None)
    return one


def table(results: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Return the results as a table, in a style of tabulate's."""
    rows = [
        (
            one["subject"],
            one["recipe"],
            f"rank {one['rank']}",
            WAYS[one["way"]],
            f"{100 * one['base']:.2f}%",
            f"{statistics.fmean(one['ratios']):.2f}",
            f"{max(one['ratios']):.2f}",
        )
        for one in results
    ]
    headers = ("", "recipe", "LoRA", "it is", "error without", "with it, over that", "worst draw")
    return str(tabulate(rows, headers, tablefmt=style, disable_numparse=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON after every recipe, print the table."""
    parser = subjects.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--draws", type=int, default=4)
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    for name in options.names:
        for recipe in options.recipes:
            results += measure(name, recipe, options.ranks, options)
            record.write(options.out, _NAME, record.settings(options), results)
    print(table(results))


if __name__ == "__main__":
    main()
