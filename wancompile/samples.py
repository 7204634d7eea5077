"""Calibration data: batches of calls, or a callable that runs the model while we listen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from wancompile.errors import CalibrationError, InputError
from wancompile.signature import name_arguments, parameters_of

Call = dict[str, Any]
CalibData = Iterable[Mapping[str, Any] | Sequence[Any]] | Callable[..., Any]
Run = Callable[..., Any]


def drive(
    model: torch.nn.Module,
    data: CalibData,
    begin: Callable[[Sequence[Call]], Run],
    *,
    progress: bool = False,
) -> None:
    """Feed every call in `data` to what `begin` returns.

    `begin` is called once with the calls known by then: all of them where `data` is a sequence, the
    first one otherwise. A callable is run with the model's forward replaced by the runner, so that
    a whole pipeline works as calibration; the forward is put back whatever happens.
    """
    if callable(data):
        _listen(model, data, begin)
        return
    bar = tqdm(_calls(model, data), desc="calibrate", disable=not progress, unit="call")
    calls = iter(bar)
    known = _calls(model, data) if isinstance(data, Sequence) else itertools.islice(calls, 1)
    first = list(known)
    if not first:
        raise CalibrationError("calibration data is empty")
    run = begin(first)
    if not isinstance(data, Sequence):
        run(**first[0])
    for call in calls:
        run(**call)


def _calls(
    model: torch.nn.Module, data: Iterable[Mapping[str, Any] | Sequence[Any]]
) -> Iterator[Call]:
    parameters, defaults = parameters_of(model.forward)
    for index, one in enumerate(data):
        try:
            args, kwargs = _split(one)
            yield name_arguments(parameters, defaults, args, kwargs)
        except InputError as error:
            raise InputError(f"calibration sample {index}: {error.reason}") from error


def _split(one: object) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(one, Mapping):
        return (), one
    if isinstance(one, (tuple, list)):
        return one, {}
    raise InputError(
        "a sample is a dict of named arguments or a tuple of positional ones, "
        f"not {type(one).__name__}"
    )


def _listen(
    model: torch.nn.Module,
    play: Callable[..., Any],
    begin: Callable[[Sequence[Call]], Run],
) -> None:
    parameters, defaults = parameters_of(model.forward)
    own = model.__dict__.get("forward")
    run: Run | None = None

    def restore() -> None:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.__dict__["forward"] = own

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        call = name_arguments(parameters, defaults, args, kwargs)
        if run is None:
            restore()
            run = begin([call])
            model.__dict__["forward"] = forward
        return wrap_output(run(**call), call)

    model.__dict__["forward"] = forward
    try:
        play()
    finally:
        restore()
    if run is None:
        raise CalibrationError("calibration data is empty: the callable never ran the model")


def wrap_output(output: Any, call: Mapping[str, Any]) -> Any:
    """Return `output` as the model's forward would: diffusers models wrap it unless told not to."""
    if not call.get("return_dict"):
        return output
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output[0])
