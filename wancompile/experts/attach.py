"""Compiled experts in a pipeline."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from wancompile.compiled import CompiledModel
from wancompile.errors import PipelineError
from wancompile.experts.pipe import Pipeline, boundary_of, denoisers, told_boundary


def attach(pipe: Pipeline, experts: Mapping[str, CompiledModel], boundary: float | None) -> None:
    """Put `experts` into their places in `pipe`; see `CompiledPipeline.attach`."""
    _check_places(pipe, experts)
    _check_boundary(pipe, experts, boundary)
    for name, part in denoisers(pipe).items():
        _check_config(name, getattr(part, "config", None), experts[name].config)
    _refuse_saving(pipe)
    for name, model in experts.items():
        setattr(pipe, name, model)
    offload_again: Any = getattr(pipe, "maybe_free_model_hooks", None)
    if offload_again is not None:
        offload_again()


def _check_places(pipe: Pipeline, experts: Mapping[str, CompiledModel]) -> None:
    for name in experts:
        if name not in pipe.components:
            raise PipelineError(
                f"{type(pipe).__name__} has no place for the expert {name}; it has "
                f"{', '.join(pipe.components)}"
            )
    for name in denoisers(pipe):
        if name not in experts:
            raise PipelineError(
                f"the pipeline has an expert {name}, which is not among those compiled: "
                f"{', '.join(experts)}"
            )


def _check_boundary(
    pipe: Pipeline, experts: Mapping[str, CompiledModel], boundary: float | None
) -> None:
    if boundary_of(pipe) != boundary:
        compiled = "without one" if boundary is None else f"with boundary_ratio {boundary:g}"
        raise PipelineError(
            f"{told_boundary(pipe)}, but the experts were calibrated {compiled}: they would get "
            "timesteps that they have not seen"
        )
    there = denoisers(pipe)
    missing = [name for name in experts if name not in there]
    if boundary is None and there and missing:
        raise PipelineError(
            f"the pipeline has no {missing[0]}, and as {told_boundary(pipe)}, it would not call one"
        )


def _check_config(name: str, mine: Any, compiled: Any) -> None:
    """Refuse an expert of another configuration; where one is not known nothing can be said."""
    if not isinstance(mine, Mapping) or not isinstance(compiled, Mapping):
        return
    one, other = _public(mine), _public(compiled)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            raise PipelineError(
                f"the compiled {name} is of another model: its {key} is {other.get(key)!r}, and "
                f"{one.get(key)!r} in the pipeline"
            )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in config.items() if not key.startswith("_")}


def _plain(value: Any) -> Any:
    """Return tuples as lists: JSON, which configurations come from, does not tell them apart."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


# diffusers warns that it cannot save a part it does not know, and writes all others: a folder that
# lacks its transformer, which shows when it is loaded. So the pipeline's own method is covered.


def _refuse_saving(pipe: Pipeline) -> None:
    if not hasattr(pipe, "save_pretrained") or "save_pretrained" in vars(pipe):
        return
    # Not the pipeline itself: a cycle would keep its memory until the garbage collector comes by.
    vars(pipe)["save_pretrained"] = partial(_save_pretrained, weakref.ref(pipe))


def _save_pretrained(of: weakref.ref[Any], *args: Any, **kwargs: Any) -> Any:
    """Save the pipeline, unless compiled parts are in it."""
    pipe: Any = of()
    found = [name for name, one in pipe.components.items() if isinstance(one, CompiledModel)]
    if found:
        raise PipelineError(
            f"save_pretrained cannot write the compiled {' and '.join(found)}: save these by "
            "`save` of what wancompile.compile returned, and read them by wancompile.load"
        )
    return type(pipe).save_pretrained(pipe, *args, **kwargs)
