"""What LoRAs beside the weights cost: time per layer with them over time without, in one run.

    python -m benchmarks.lora [--row t2v-14b-480p] [--recipes int8 fp8] [--ranks 16 32 128]

Models with random bf16 weights at their published widths, of one layer and of three; the time of a
layer is half of the difference. A LoRA of each rank changes every linear of every block. Rounds
without and with each of them take turns, so that a card that slows down slows all of them. The
first load, which lowers the program anew, and that of another LoRA into the same room are timed for
three layers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import wancompile
from benchmarks import h100_model as models
from benchmarks import record
from benchmarks.h100_plan import DEEP, ROWS, SHALLOW, Row
from wancompile.compiled import CompiledModel

_SIZE = 0.1  # of B A beside the weight
_WITHOUT = "without"


class Subject:
    """A few layers, compiled: without a LoRA, and once for each LoRA, with room for it alone.

    All of them share their weights. `first_s` and `swap_s` are the seconds that the first load of a
    LoRA took, and that of another one into its room.
    """

    def __init__(
        self, row: Row, layers: int, recipe: str, ranks: Sequence[int], options: Any
    ) -> None:
        self._device = torch.device(options.device)
        model = models.build(row, layers, self._device, options.tiny)
        loras = {f"rank {rank}": random_lora(model, rank) for rank in ranks}
        call = models.calibration(row, self._device, options.tiny)
        whole = wancompile.compile(model, [call], recipe, consume=True, limits=None)
        del model
        gc.collect()
        models.clear(self._device)
        self.call = models.inputs(row, self._device, options.tiny)
        self._models: dict[str, CompiledModel] = {_WITHOUT: whole}
        self.first_s: dict[str, float] = {}
        self.swap_s: dict[str, float] = {}
        for name, lora in loras.items():
            one = CompiledModel(whole.fused, whole.report, whole.config, whole.dtype)
            self.first_s[name], self.swap_s[name] = self._load(one, lora), self._load(one, lora)
            self._models[name] = one

    def _load(self, model: CompiledModel, lora: dict[str, Tensor]) -> float:
        models.synchronize(self._device)
        started = time.perf_counter()
        model.load_lora(lora)
        models.synchronize(self._device)
        return time.perf_counter() - started

    def milliseconds(self, name: str) -> float:
        """Time one forward, not the first one."""
        model = self._models[name]
        return models.milliseconds(lambda: model(**self.call), self._device)


def random_lora(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a LoRA for every linear of every block, as diffusers stores it."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("blocks."):
            rows, columns = module.weight.shape
            device, dtype = module.weight.device, module.weight.dtype
            down = torch.randn(rank, columns, device=device) / columns**0.5
            up = torch.randn(rows, rank, device=device)
            up *= _SIZE * module.weight.float().norm() / (up @ down).norm()
            found[f"transformer.{path}.lora_A.weight"] = down.to(dtype).cpu()
            found[f"transformer.{path}.lora_B.weight"] = up.to(dtype).cpu()
    return found


def measure(row: Row, recipe: str, ranks: Sequence[int], options: Any) -> list[dict[str, Any]]:
    """Return the time of a layer without and with each LoRA, and what changing them takes."""
    deep, shallow = (Subject(row, layers, recipe, ranks, options) for layers in (DEEP, SHALLOW))
    layers: dict[str, list[float]] = {_WITHOUT: [], **{f"rank {rank}": [] for rank in ranks}}
    for name in layers:  # the first forwards compile kernels
        deep.milliseconds(name)
        shallow.milliseconds(name)
    for _ in range(options.rounds):
        for name, found in layers.items():
            pairs = (
                (deep.milliseconds(name), shallow.milliseconds(name))
                for _ in range(options.repeats)
            )
            found.append(statistics.median(a - b for a, b in pairs) / (DEEP - SHALLOW))
    base = layers[_WITHOUT]
    return [
        {
            "row": row.name,
            "recipe": recipe,
            "lora": name,
            "layer_ms": statistics.median(found),
            "over_without": statistics.median(a / b for a, b in zip(found, base, strict=True)),
            "spread": (max(found) - min(found)) / statistics.median(found),
            "first_load_s": deep.first_s.get(name),
            "swap_s": deep.swap_s.get(name),
        }
        for name, found in layers.items()
    ]


def table(results: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """Return the results as a table, in a style of tabulate's."""
    headers = ["recipe", "LoRA", "ms a layer", "over none", "spread", "first load s", "swap s"]
    rows = [
        [
            one["recipe"],
            one["lora"],
            f"{one['layer_ms']:.3f}",
            f"{one['over_without']:.4f}",
            f"{100 * one['spread']:.1f} %",
            "-" if one["first_load_s"] is None else f"{one['first_load_s']:.2f}",
            "-" if one["swap_s"] is None else f"{one['swap_s']:.3f}",
        ]
        for one in results
    ]
    return str(tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=sorted(ROWS), default="t2v-14b-480p")
    parser.add_argument("--recipes", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 128])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="narrow and short, to try it out")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    ranks = sorted(options.ranks)
    results = []
    for recipe in options.recipes:
        results += measure(ROWS[options.row], recipe, ranks, options)
        models.clear(torch.device(options.device))
    record.write(options.out, "lora", record.settings(options), results)
    print(table(results))


if __name__ == "__main__":
    main()
