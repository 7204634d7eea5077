"""Calibration data: batches of calls, or a callable that runs the model while we listen.

Calls come in kinds: guided sampling runs the model with the prompt ("cond") and without it
("uncond"). diffusers pipelines say which by `with model.cache_context("cond")`, and a `Sample` says
it in a list of calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from wancompile.errors import CalibrationError, InputError, of_expert
from wancompile.quant.lines import KINDS
from wancompile.signature import flatten, name_arguments, parameters_of


@dataclass(frozen=True)
class Sample:
    """One call of the model for calibration, and its kind.

    `call` holds the named (a mapping) or positional (a sequence) arguments of forward. `label` is
    "cond" with the prompt, "uncond" without it, or "": kinds by which statistics are kept apart.

    Raises:
        InputError: there is no such label.
    """

    call: Mapping[str, Any] | Sequence[Any]
    label: str = ""

    def __post_init__(self) -> None:
        if self.label not in KINDS:
            known = ", ".join(map(repr, KINDS))
            raise InputError(f"a sample is labelled {known}, not {self.label!r}")


Call = dict[str, Any]
CalibData = Iterable[Sample | Mapping[str, Any] | Sequence[Any]] | Callable[..., Any]
"""Calls of a model, each a `Sample`, or named or positional arguments; or what runs the model."""

Run = Callable[[Call, str], Any]
"""Takes the named arguments of a call, and its kind; returns what the model returns."""


def drive(
    model: torch.nn.Module,
    data: CalibData,
    begin: Callable[[Sequence[Call]], Run],
    *,
    total: int | None = None,
    progress: bool = False,
) -> None:
    """Feed every call in `data` to what `begin` returns.

    `begin` is called once with the calls known by then: all of them where `data` is a sequence, the
    first one otherwise. A callable is run with the model's forward replaced by the runner, so that
    a whole pipeline works as calibration; the forward is put back whatever happens. `total` is the
    number of calls to expect, for the time left in the progress bar; a sequence knows its own.

    Raises:
        InputError: a sample does not fit the model's forward, or the samples before it.
        CalibrationError: there is no sample, or one holds NaN or infinity.
    """
    if total is None and isinstance(data, Sized):
        total = len(data)
    with tqdm(total=total, desc="calibrate", disable=not progress, unit="call") as bar:
        if callable(data):
            _listen(model, data, begin, bar)
            return
        calls = _calls(model, data)
        known = list(calls if isinstance(data, Sequence) else itertools.islice(calls, 1))
        if not known:
            raise CalibrationError("calibration data is empty", pass_name="calibrate")
        run = begin([call for call, _ in known])
        for index, (call, label) in enumerate(itertools.chain(known, calls)):
            with _naming(index):
                run(call, label)
            bar.update()


# What of a model is replaced while a callable runs it.
_HEARD = ("forward", "cache_context")


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
    model: torch.nn.Module, data: Iterable[Sample | Mapping[str, Any] | Sequence[Any]]
) -> Iterator[tuple[Call, str]]:
    parameters, defaults = parameters_of(model.forward)
    for index, one in enumerate(data):
        sample = one if isinstance(one, Sample) else Sample(one)
        with _naming(index):
            args, kwargs = _split(sample.call)
            call = name_arguments(parameters, defaults, args, kwargs)
        _check_finite(call, index)
        yield call, sample.label


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
    ears = Ears(model, begin, bar)
    ears.put_on()
    try:
        play()
    finally:
        ears.take_off()
    if not ears.heard:
        raise CalibrationError(
            "calibration data is empty: the callable never ran the model", pass_name="calibrate"
        )


class Ears:
    """Stand-ins for a model's forward and for the context in which pipelines name its calls.

    `heard` counts the calls of forward. What the model had of its own is put back by `take_off`.
    Errors name the `expert` that the model is, if any.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        begin: Callable[[Sequence[Call]], Run],
        bar: tqdm[Any],
        *,
        expert: str = "",
    ) -> None:
        self.heard = 0
        self._expert = expert
        self._model = model
        self._begin = begin
        self._bar = bar
        self._label = ""
        self._run: Run | None = None
        self._parameters, self._defaults = parameters_of(model.forward)
        self._context = getattr(model, "cache_context", None)
        self._own = {name: model.__dict__[name] for name in _HEARD if name in model.__dict__}

    def put_on(self) -> None:
        """Begin to listen."""
        self._model.__dict__["forward"] = self._forward
        if self._context is not None:
            self._model.__dict__["cache_context"] = self._named

    def take_off(self) -> None:
        """Leave the model as it was."""
        for name in _HEARD:
            self._model.__dict__.pop(name, None)
        self._model.__dict__.update(self._own)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        index, self.heard = self.heard, self.heard + 1
        with of_expert(self._expert), _naming(index):
            call = name_arguments(self._parameters, self._defaults, args, kwargs)
            _check_finite(call, index)
            if self._run is None:
                self._run = self._begun(call)
            output = self._run(call, self._label)
        self._bar.update()
        return wrap_output(output, call)

    def _begun(self, call: Call) -> Run:
        """Make the runner while the model is as it was."""
        self.take_off()
        run = self._begin([call])
        self.put_on()
        return run

    @contextmanager
    def _named(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, self._label = self._label, name if name in KINDS else ""
        try:
            with self._context(name, *args, **kwargs):  # type: ignore[misc]
                yield
        finally:
            self._label = before


def wrap_output(output: Any, call: Mapping[str, Any]) -> Any:
    """Return `output` as the model's forward would: diffusers models wrap it unless told not to."""
    if not call.get("return_dict"):
        return output
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output[0])
