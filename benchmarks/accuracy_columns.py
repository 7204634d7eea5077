"""What is compared: ways to run a trained model, each with the recipe, the package and the type.

A column is a name and a function from a subject to something that is called like its model. To add
one, append it to `COLUMNS`; nothing else lists them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import wancompile
from benchmarks import subjects
from wancompile.quant.stats import Stats
from wancompile.recipe import QSpec, Recipe, resolve

_PARTS = "blocks"
"""The name of the list whose linears every column quantizes, and nothing but those."""


class Unavailable(Exception):
    """A column cannot run on this machine; the text says why."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is to be quantized, and the calls to calibrate on.

    No column changes `model`: those that work in place take a copy. `is_reference` says that it is
    the very model that all are compared with.
    """

    model: Any
    calls: Sequence[Mapping[str, Any]]
    is_reference: bool = False

    @cached_property
    def stats(self) -> Stats:
        """What calibration learned; computed once."""
        return wancompile.calibrate(self.model, self.calls)

    @cached_property
    def in_bf16(self) -> Subject:
        """The same in bf16, as models are run."""
        model = subjects.in_bf16(self.model)
        return Subject(model, [cast(call, model.dtype) for call in self.calls])

    def copy(self) -> Any:
        """Return a copy of the model, to be changed."""
        return copy.deepcopy(self.model)


def cast(call: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a call of a float32 model as one of another type; timesteps stay as they are."""
    return {
        name: value.to(dtype) if name != "timestep" and isinstance(value, Tensor) else value
        for name, value in call.items()
    }


Make = Callable[[Subject], Any]


@dataclass(frozen=True)
class Column:
    """One way to run a model.

    `make` returns something that is called like the model and has its `dtype`, `device` and
    `config`; it raises `Unavailable` where it cannot.
    """

    name: str
    title: str
    make: Make


def _floating(subject: Subject) -> Any:
    if subject.is_reference:
        raise Unavailable("it is what all others are compared with")
    return subject.model


def _ours(recipe: Recipe, *, calibrated: bool = True) -> Make:
    """Return a column by a recipe. The gate is off: it would mend what is to be measured."""

    def make(subject: Subject) -> Any:
        stats = subject.stats if calibrated else None
        call = subject.calls[0]
        return wancompile.compile(
            subject.model, recipe=recipe, stats=stats, example_inputs=call, limits=None
        )

    return make


def _auto(max_error: float) -> Make:
    """Return a column by a budget, which keeps some of the calls from calibration.

    The worst of those stays below it; the worst call of another video may lie beyond it.
    """

    def make(subject: Subject) -> Any:
        wish = Recipe.auto(max_error=max_error)
        return wancompile.compile(subject.model, list(subject.calls), wish, limits=None)

    return make


def _whole_in_bf16(make: Make) -> Make:
    return lambda subject: make(subject.in_bf16)


def _torchao(name: str, **options: Any) -> Make:
    """Return a column by a config of torchao; options are names of classes in the same module."""

    def make(subject: Subject) -> Any:
        is_fp8 = name.startswith("Float8")
        if is_fp8 and subject.model.device.type != "cuda":
            raise Unavailable("torchao's fp8 products are for GPUs")
        try:
            from torchao import quantization
        except ImportError as error:
            raise Unavailable(f"torchao is not installed: {error}") from error
        given = {key: getattr(quantization, value)() for key, value in options.items()}
        model = subject.copy()
        if is_fp8 and model.dtype == torch.float32:
            _put_linears_in_bf16(model)
        quantization.quantize_(model, getattr(quantization, name)(**given), _in_a_block)
        return model

    return make


def _in_a_block(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(f"{_PARTS}.")


class _InBf16(nn.Module):
    """A linear of a float32 model, in bf16: no other type do torchao's fp8 products by row take."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.bfloat16()).to(x.dtype)


def _put_linears_in_bf16(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if _in_a_block(module, name):
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, _InBf16(module))


def _modelopt(config: str, algorithm: Mapping[str, Any] | None = None) -> Make:
    """Return a column by a published configuration of ModelOpt, which rounds in floating point."""

    def make(subject: Subject) -> Any:
        try:
            import modelopt.torch.quantization as mtq
            from modelopt.torch.quantization import extensions
        except ImportError as error:
            raise Unavailable(f"ModelOpt is not installed: {error}") from error
        # To compile its CUDA kernels takes a minute; without, it rounds alike in plain PyTorch.
        extensions.get_cuda_ext.extension = extensions.get_cuda_ext_fp8.extension = None
        model = subject.copy()
        settings = copy.deepcopy(getattr(mtq, config))
        settings["quant_cfg"] += [
            {"quantizer_name": f"{child}*", "enable": False}
            for child, _ in model.named_children()
            if child != _PARTS
        ]
        if algorithm is not None:
            settings["algorithm"] = dict(algorithm)
        return mtq.quantize(model, settings, lambda quantized: _play(quantized, subject.calls))

    return make


def _play(model: nn.Module, calls: Sequence[Mapping[str, Any]]) -> None:
    with torch.no_grad():
        for call in calls:
            model(**call)


COLUMNS: tuple[Column, ...] = (
    Column("float", "float32, not quantized", _floating),
    Column("bf16", "bf16, not quantized", _whole_in_bf16(_floating)),
    Column("int8", "ours int8", _ours(resolve("int8"))),
    Column("torchao-fp8", "torchao fp8, per row",
           _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow")),
    Column("modelopt-int8", "ModelOpt int8 SmoothQuant", _modelopt("INT8_SMOOTHQUANT_CFG")),
    Column("fp8", "ours fp8", _ours(resolve("fp8"))),
    Column("int8-attention", "ours int8, 8-bit attention, values in bf16",
           _ours(resolve("int8-attention"))),
    Column("int8-attention-fast", "ours int8, 8-bit attention, values in fp8",
           _ours(resolve("int8-attention-fast"))),
    Column("fp8-attention", "ours fp8, 8-bit attention", _ours(resolve("fp8-attention"))),
    Column("int8-rounded", "int8, round to nearest", _ours(resolve("int8"), calibrated=False)),
    Column("fp8-rounded", "fp8, round to nearest", _ours(resolve("fp8"), calibrated=False)),
    Column("int8-nearest", "ours int8, smoothed, weights to nearest",
           _ours(Recipe("int8-nearest", QSpec("int8")))),
    Column("torchao-int8", "torchao int8, dynamic",
           _torchao("Int8DynamicActivationInt8WeightConfig")),
    Column("bf16-int8", "bf16, ours int8", _whole_in_bf16(_ours(resolve("int8")))),
    Column("bf16-torchao-fp8", "bf16, torchao fp8, per row",
           _whole_in_bf16(_torchao("Float8DynamicActivationFloat8WeightConfig",
                                   granularity="PerRow"))),
    Column("modelopt-fp8", "ModelOpt fp8", _modelopt("FP8_DEFAULT_CFG")),
    Column("modelopt-int8-half", "ModelOpt int8 SmoothQuant, alpha 0.5",
           _modelopt("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5})),
    Column("auto-0.5", "ours, budget 0.5 %", _auto(0.005)),
    Column("auto-1", "ours, budget 1 %", _auto(0.01)),
    Column("auto-2", "ours, budget 2 %", _auto(0.02)),
)  # fmt: skip
"""In the order in which they are measured: what the goals speak of comes first.

All but linears is in float32, so that what is compared is their rounding; bf16's own is as large.
Those that say so are in bf16 altogether.
Rounding to nearest is ours without calibration, which is without smoothing, too: the rest is one.
"""
