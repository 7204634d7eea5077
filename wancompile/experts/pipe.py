"""Which parts of a pipeline are transformers that denoise, by their interface alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

import torch

from wancompile.compiled import CompiledModel
from wancompile.errors import PipelineError

# What a part's forward takes if the pipeline denoises with it.
_DENOISES = frozenset({"hidden_states", "timestep"})


class Pipeline(Protocol):
    """What is taken for a pipeline: it can be called, and its parts have names.

    Each part in `components` is an attribute of the same name, too; None is a place without one.
    """

    @property
    def components(self) -> Mapping[str, Any]:
        """The parts by name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a video."""


def is_pipeline(given: object) -> TypeGuard[Pipeline]:
    """Whether `given` is a pipeline and not a model."""
    is_module = isinstance(given, torch.nn.Module)
    return not is_module and callable(given) and isinstance(_components(given), Mapping)


def _components(given: object) -> Any:
    return getattr(given, "components", None)


def denoisers(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """Return the parts that denoise by name, in order, compiled ones among them."""
    return {name: part for name, part in pipe.components.items() if _denoises(part)}


def _denoises(part: object) -> bool:
    if isinstance(part, CompiledModel):
        return True
    if not isinstance(part, torch.nn.Module):
        return False
    return inspect.signature(part.forward).parameters.keys() >= _DENOISES


def experts_of(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """Return the parts that denoise, to be compiled.

    Raises:
        PipelineError: there is none, one is compiled already, or parts are moved by hooks.
    """
    found = denoisers(pipe)
    if not found:
        raise PipelineError(
            f"{type(pipe).__name__} has no part that denoises: none of "
            f"{', '.join(pipe.components)} is loaded and takes hidden_states and a timestep"
        )
    for name, part in found.items():
        if isinstance(part, CompiledModel):
            raise PipelineError(
                f"the pipeline's {name} is compiled already: load the original again to compile it "
                "in another way"
            )
    hooked = [name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")]
    if hooked:
        raise PipelineError(
            f"the pipeline moves its {hooked[0]} by a hook, as enable_model_cpu_offload sets it, "
            "which calibration would pass by: call pipe.remove_all_hooks() first, compile with "
            "device=..., and enable offloading afterwards"
        )
    return found


def boundary_of(pipe: Pipeline) -> float | None:
    """Return the share of the noise at which the pipeline switches experts, if it does."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return None if ratio is None else float(ratio)


def told_boundary(pipe: Pipeline) -> str:
    """Return in words where the pipeline switches experts."""
    ratio = boundary_of(pipe)
    if ratio is None:
        return "the pipeline never switches experts, for its boundary_ratio is None"
    config = getattr(getattr(pipe, "scheduler", None), "config", None)
    steps = getattr(config, "num_train_timesteps", None)
    where = "" if steps is None else f" at timestep {ratio * steps:g}"
    return f"the pipeline switches experts{where} (boundary_ratio {ratio:g})"
