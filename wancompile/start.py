"""What comes before quantization: a NORMAL program, its statistics, and what to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from wancompile import passes, pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import InputError
from wancompile.export import export
from wancompile.gate.evidence import Evidence, HoldBack
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.resume import Resumable
from wancompile.samples import CalibData, Call, Run, drive
from wancompile.signature import name_arguments, parameters_of


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a model is compiled from.

    `program` is at level NORMAL, `call` one call to check folds on, `stats` what calibration
    learned, if there was any, and `evidence` what the gate compares with, where it is wanted.
    """

    program: Program
    call: Call
    stats: Stats | None
    evidence: Evidence | None


class Started:
    """A calibration, begun when the first calls are known.

    Args:
        model: what is called; it is traced on its first calls.
        device: where to compute, if not where the model is.
        checkpoint: a file to go on from.
        dump: a folder for the text of every level.
        gated: whether some calls are kept from calibration, to compare with.
        live: whether the outputs of calls are used, and decide the calls after them.
        options: of the calibration.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device | None,
        checkpoint: Path | None,
        dump: Path | None,
        *,
        gated: bool,
        live: bool,
        **options: int,
    ) -> None:
        self._model = model
        self._live = live
        self._device = device
        self._checkpoint = checkpoint
        self._dump = dump
        self._options = options
        self._gated = gated
        self._resumable: Resumable | None = None
        self._held: HoldBack | None = None
        self._calibration: Calibration
        self._program: Program
        self._first_call: Call

    def __call__(self, calls: Sequence[Call]) -> Run:
        """Trace the model on its first calls, and return what observes every call."""
        near = [beside(self._model, call) for call in calls]
        self._first_call = near[0]
        self._program = normalize(self._model, near, device=self._device, dump=self._dump)
        path, device = self._checkpoint, self._device
        undo = path is not None
        self._calibration = Calibration(self._program, device=device, undo=undo, **self._options)
        observe: Run = self._calibration.observe
        if path is not None:
            # Which calls count depends on what is held back, too.
            options = {"held_back": self._gated, **self._options}
            self._resumable = Resumable(self._calibration, path, options, live=self._live)
            observe = self._resumable
        if self._gated:
            observe = self._held = HoldBack(self._calibration, self._program, device, observe)
        return lambda call, label: _near(call, observe(beside(self._model, call), label))

    def keep(self) -> None:
        """Write what has been learned to the checkpoint, after an interrupt, too."""
        if self._resumable is not None:
            self._resumable.keep()

    def prepared(self) -> Prepared:
        """Return what was learned, when all calls have been run.

        Raises:
            CalibrationError: the checkpoint counts more calls than there were.
        """
        return Prepared(self._program, self._first_call, self.stats(), self._evidence())

    def stats(self) -> Stats:
        """Return the statistics alone; raises what `prepared` raises."""
        if self._resumable is not None:
            self._resumable.finish()
        return self._calibration.stats()

    def _evidence(self) -> Evidence | None:
        """Return what the gate compares with: the calls held back, or the first one."""
        if self._held is None:
            return None
        if self._held.held:
            return self._held.evidence()
        return Evidence.of(self._program, [self._first_call], device=self._device)


def run(
    started: Started,
    model: torch.nn.Module,
    data: CalibData,
    *,
    total: int | None = None,
    progress: bool,
) -> None:
    """Run all calls of `data`; an interrupted run is kept, too."""
    try:
        drive(model, data, started, total=total, progress=progress)
    finally:
        started.keep()


def from_example(
    model: torch.nn.Module,
    stats: Stats | None,
    example: Mapping[str, Any] | Sequence[Any] | None,
    device: torch.device | None,
    dump: Path | None,
    *,
    gated: bool,
) -> Prepared:
    """Return what there is without data: one call, and statistics of an earlier run, if any."""
    if example is None:
        raise InputError("without calib_data, example_inputs must show one call of the model")
    call = beside(model, named(model, example))
    program = normalize(model, [call], device=device, dump=dump)
    evidence = Evidence.of(program, [call], device=device) if gated else None
    return Prepared(program, call, stats, evidence)


def normalize(
    model: torch.nn.Module,
    calls: Sequence[Call],
    *,
    dynamic: bool = True,
    device: torch.device | None = None,
    dump: Path | None,
) -> Program:
    """Return `model` as a program at level NORMAL; rewrites are checked on `device`."""
    program = export(model, calls, dynamic=dynamic)
    is_real = not any(tensor.is_meta for tensor in program.state.values())
    probe = pipeline.Probe(calls[0], device) if is_real else None
    return pipeline.run(program, passes.NORMALIZE, probe=probe, dump=dump)


def device_of(device: torch.device | str | None) -> torch.device | None:
    """Return the device that a caller named; raise `InputError` if nothing can run there."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot compute on the device {device!r}: {reason}") from error
    return found


def beside(model: torch.nn.Module, call: Call) -> Call:
    """Return the call with its tensors where the model's are."""
    weights = itertools.chain(model.parameters(), model.buffers())
    home = next((tensor.device for tensor in weights), None)
    return dict(_moved(dict(call), home))


def _near(call: Call, output: Any) -> Any:
    """Return the output where the call's first tensor is: its caller goes on computing there."""
    leaves = pytree.tree_leaves(dict(call))
    first = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    return output if first is None else _moved(output, first.device)


def _moved(tree: Any, device: torch.device | None) -> Any:
    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(moved, tree)


def named(model: torch.nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of one call by name."""
    parameters, defaults = parameters_of(model.forward)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    return name_arguments(parameters, defaults, args, kwargs)


def need_weights(model: torch.nn.Module) -> None:
    """Raise `InputError` if `model` has no values to compute with."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model's weights are on the meta device: load them first")
