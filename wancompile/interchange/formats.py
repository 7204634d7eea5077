"""The formats: which tensors and which JSON files each consists of.

Sources: ComfyUI's `convert_old_quants` for scaled fp8 (`NAME.weight` in e4m3, `NAME.scale_weight`
fp32 [], and a marker `scaled_fp8` whose two elements say that activations stay in floating point);
NVIDIA ModelOpt's unified checkpoint (`NAME.weight` in e4m3, `NAME.weight_scale` fp32 [N],
`hf_quant_config.json`) with the algorithm FP8_PER_CHANNEL_PER_TOKEN; diffusers' `save_pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import wancompile
from wancompile.interchange.names import Original, original
from wancompile.interchange.plain import Plain
from wancompile.quant.numerics import FP8, QTensor, absmax_scale, decode, quantize, quantize_weight

_DIFFUSERS_FILE = "diffusion_pytorch_model"
_ROWS = 1024
_ALGORITHM = "FP8_PER_CHANNEL_PER_TOKEN"


@dataclass
class Contents:
    """What a format makes of a model.

    Attributes:
        tensors: by the names of the format, in the order in which they are written.
        documents: JSON files beside them, by file name.
        errors: relative L2 error of each 8-bit weight of the compiled model as it is written.
        kept: weights whose 8 bits are written as they are.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """One format.

    `make` takes the parameters, the shape and dtype that each has in the model, and diffusers'
    configuration. A single file is called after the target, several by `stem` in a folder.
    """

    make: Callable[[Plain, Mapping[str, Tensor], Mapping[str, Any]], Contents]
    stem: str = ""


def _diffusers(plain: Plain, wanted: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    made = Contents(documents={"config.json": dict(config)})
    for name, like in wanted.items():
        exact = plain.value(name, like.shape)
        made.tensors[name] = exact.to(like.dtype)
        if plain.is_quantized(name):
            made.errors[name] = _error(made.tensors[name], exact)
    return made


def _modelopt(plain: Plain, wanted: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    made = Contents()
    for name, like in wanted.items():
        if not plain.is_quantized(name):
            made.tensors[name] = plain.value(name, like.shape).to(like.dtype)
            continue
        found = plain.bits(name)
        if found is None or found.data.dtype != FP8:
            exact = plain.value(name, like.shape)
            found = quantize_weight(exact, FP8)
            made.errors[name] = _error(_decoded(found), exact)
        else:
            made.errors[name] = 0.0
            made.kept.append(name)
        made.tensors[name] = found.data
        made.tensors[f"{name}_scale"] = found.scale.flatten()
    left = sorted({name.rpartition(".")[0] for name, like in wanted.items() if _is_linear(like)})
    quantized = {name.rpartition(".")[0] for name in made.errors}
    exclude = [name for name in left if name not in quantized]
    producer = {"name": "modelopt", "version": f"wancompile {wancompile.__version__}"}
    quantization = {"quant_algo": _ALGORITHM, "kv_cache_quant_algo": None}
    made.documents = {
        "config.json": {
            **config,
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": _ALGORITHM,
                "ignore": exclude,
                "producer": producer,
            },
        },
        "hf_quant_config.json": {
            "producer": producer,
            "quantization": {**quantization, "exclude_modules": exclude},
        },
    }
    return made


def _comfyui(plain: Plain, wanted: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    del config  # this format has none: its readers tell the model by its names and shapes
    made = Contents()
    for there, names in _by_original(wanted).items():
        exact = torch.cat([plain.value(name, wanted[name].shape) for name in names])
        if not any(plain.is_quantized(name) for name in names):
            cast = exact.to(wanted[names[0]].dtype)
            made.tensors[there.name] = cast.reshape(there.shape) if there.shape else cast
            continue
        scale = absmax_scale(exact, (0, 1), FP8)
        found = QTensor(quantize(exact, scale, FP8), scale)
        made.errors.update(dict.fromkeys(names, _error(_decoded(found), exact)))
        made.tensors[there.name] = found.data
        path = there.name.rpartition(".")[0]
        made.tensors[f"{path}.scale_weight"] = scale.reshape(())
    # Its inputs have no calibrated scale, so they are not to be rounded.
    made.tensors["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return made


def _by_original(wanted: Mapping[str, Tensor]) -> dict[Original, list[str]]:
    found: dict[Original, list[str]] = {}
    for name in wanted:
        found.setdefault(original(name), []).append(name)
    return found


def _is_linear(like: Tensor) -> bool:
    return like.dim() == 2


def _decoded(found: QTensor) -> Tensor:
    return decode(found.data) * found.scale


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error, some rows at a time: all of them in fp64 would be large."""
    difference = size = 0.0
    for first in range(0, expected.shape[0], _ROWS):
        exact = expected[first : first + _ROWS].double()
        ours = actual[first : first + _ROWS].double()
        difference += float((ours - exact).square().sum())
        size += float(exact.square().sum())
    return math.sqrt(difference / max(size, 1e-300))


FORMATS: Mapping[str, Format] = {
    "diffusers": Format(_diffusers, _DIFFUSERS_FILE),
    "modelopt": Format(_modelopt, _DIFFUSERS_FILE),
    "comfyui-scaled-fp8": Format(_comfyui),
}
