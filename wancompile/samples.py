"""Calibration data: batches of calls, or a callable that runs the model while we listen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from wancompile.errors import CalibrationError, InputError
from wancompile.signature import flatten, name_arguments, parameters_of

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

    Raises:
        InputError: a sample does not fit the model's forward, or the samples before it.
        CalibrationError: there is no sample, or one holds NaN or infinity.
    """
    total = len(data) if isinstance(data, Sized) else None
    with tqdm(total=total, desc="calibrate", disable=not progress, unit="call") as bar:
        if callable(data):
            _listen(model, data, begin, bar)
            return
        calls = _calls(model, data)
        known = list(calls if isinstance(data, Sequence) else itertools.islice(calls, 1))
        if not known:
            raise CalibrationError("calibration data is empty", pass_name="calibrate")
        run = begin(known)
        for index, call in enumerate(itertools.chain(known, calls)):
            with _naming(index):
                run(**call)
            bar.update()


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which sample an `InputError` is about."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"calibration sample {index}: {error.reason}", pass_name="calibrate"
        ) from error


def _check_finite(call: Call, index: int) -> None:
    for name, leaf in flatten(call).items():
        if isinstance(leaf, torch.Tensor) and not bool(torch.isfinite(leaf).all()):
            raise CalibrationError(
                f"calibration sample {index}: {name} holds NaN or infinity", pass_name="calibrate"
            )


def _calls(
    model: torch.nn.Module, data: Iterable[Mapping[str, Any] | Sequence[Any]]
) -> Iterator[Call]:
    parameters, defaults = parameters_of(model.forward)
    for index, one in enumerate(data):
        with _naming(index):
            args, kwargs = _split(one)
            call = name_arguments(parameters, defaults, args, kwargs)
        _check_finite(call, index)
        yield call


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
    bar: tqdm[Any],
) -> None:
    parameters, defaults = parameters_of(model.forward)
    own = model.__dict__.get("forward")
    run: Run | None = None
    indices = itertools.count()

    def restore() -> None:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.__dict__["forward"] = own

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        index = next(indices)
        with _naming(index):
            call = name_arguments(parameters, defaults, args, kwargs)
            _check_finite(call, index)
            if run is None:
                restore()
                run = begin([call])
                model.__dict__["forward"] = forward
            output = run(**call)
        bar.update()
        return wrap_output(output, call)

    model.__dict__["forward"] = forward
    try:
        play()
    finally:
        restore()
    if run is None:
        raise CalibrationError(
            "calibration data is empty: the callable never ran the model", pass_name="calibrate"
        )


def wrap_output(output: Any, call: Mapping[str, Any]) -> Any:
    """Return `output` as the model's forward would: diffusers models wrap it unless told not to."""
    if not call.get("return_dict"):
        return output
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output[0])
