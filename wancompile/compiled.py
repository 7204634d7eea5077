"""The compiled model: a drop-in for the transformer it was made from."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wancompile import hoist, passes, pipeline
from wancompile.artifact.save import save
from wancompile.errors import ArtifactError, InputError
from wancompile.forward import OriginalForward
from wancompile.gate.again import Inputs, check_again
from wancompile.gate.check import Check
from wancompile.gate.evidence import Evidence
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.ir import match
from wancompile.lora.branches import Branches
from wancompile.lora.model import TakesLoras
from wancompile.part import PipelinePart
from wancompile.program import Program
from wancompile.report import Report
from wancompile.samples import wrap_output
from wancompile.signature import name_arguments

_PRODUCTS = frozenset(
    {
        torch.ops.wancompile.scaled_linear.default,
        torch.ops.wancompile.scaled_linear_residual.default,
        torch.ops.wancompile.scaled_linear_low_rank.default,
        torch.ops.wancompile.linear_gelu_quantize.default,
        torch.ops.wancompile.scaled_attention.default,
    }
)


class CompiledModel(TakesLoras, PipelinePart):
    """Runs a quantized program behind the interface of the model it replaces.

    It takes the arguments of the original's forward and returns what that returned, offers
    `config`, `dtype`, `device` and `cache_context` as diffusers pipelines ask for them, and moves
    between devices with `to`. Weights keep their types: `to(dtype)` is refused, silently rounding
    scales would be worse.

    What depends on the encoder states alone is computed once for each prompt, see `hoist`. LoRAs
    come and go with `load_lora`, `set_lora` and `unload_lora`, or are merged with `merge_lora`.

    Attributes:
        program: the whole program, at level LOWERED.
        config: the configuration of the original, None where it had none.
        report: what was rewritten, what was skipped and why, errors per site.
    """

    def __init__(
        self,
        fused: Program,
        report: Report,
        config: Any,
        dtype: torch.dtype,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__()
        self._evidence = evidence
        self._fused = fused
        self._dtype = dtype
        self.config = config
        self.report = report
        self._hoisted = _Hoisted()
        self._loop: hoist.Loop | None = None
        self._branches = Branches(fused)
        self.program = fused
        self._lower(_device_of(fused))
        self.eval()

    def _lower(self, device: torch.device) -> None:
        self._device = device
        self._base = pipeline.run(self._fused, passes.lowering(device))
        warn_of_plain(self._base, device)
        loras, self._branches = self._branches.loras, Branches(self._fused)
        self._have(loras)

    def _run(self, program: Program) -> None:
        if program is self.program:
            if self._loop is not None:
                self._loop.renew()
            return
        self.program = program
        self.report = self.report.with_program(program)
        self._arrange()

    def _arrange(self) -> None:
        """Prepare what runs: the program as it is, or what depends on the prompt apart."""
        wish, self._loop = self._hoisted, None
        found = hoist.find(self._fused, wish.inputs) if wish.prompts else None
        if found is None:
            self.report = replace(self.report, hoisting=None)
            self.lowered = self.program.module
            return
        parts = hoist.split(self.program, found.inputs)
        away = wish.offload and hoist.is_apart(self._device)
        if away:
            parts = self._send_away(parts, found.weights)
        self._loop = hoist.Loop(parts, wish.prompts, self._device, away=away)
        self.report = replace(
            self.report, hoisting=self._loop.described(hoist.facts(self._fused, found))
        )
        # Registered is what torch.export may need; what is away has no place on the device.
        self.lowered = self._loop.body if away else self.program.module

    def _send_away(self, parts: hoist.Split, weights: frozenset[str]) -> hoist.Split:
        """Let whatever holds what the prologue alone reads hold it on the host.

        That is `weights`, those of the model, and what LoRAs have beside them.
        """
        added = parts.alone - weights
        moved = {
            **hoist.to_host(self._fused, weights, self._device),
            **hoist.to_host(self.program, added, self._device),
        }
        is_base = self.program is self._base
        self._fused = hoist.holding(self._fused, moved)
        self._base = hoist.holding(self._base, moved)
        with_loras = self._branches.hold(moved)
        # The same object, so that another LoRA in the same room is known to need no more than that.
        self.program = self._base if is_base or with_loras is None else with_loras
        return parts.holding(moved)

    def hoist(
        self, prompts: int = 2, *, inputs: Sequence[str] | None = None, offload: bool = False
    ) -> None:
        """Say for how many prompts to keep what depends on them alone, bit for bit the same.

        Text embedding and the keys and values of cross-attention are the same at each step of a
        denoising loop. They are computed when a call comes with other tensor objects than the last
        ones, or with tensors that were written to. The report says what that is, and what is kept.

        Args:
            prompts: the last of them to keep, as a conditional and an unconditional one take turns;
                with 0 everything is computed in each call.
            inputs: the names of the tensors that stay the same over a loop; if not given, the
                encoder states, as found in the dataflow.
            offload: keep the weights that only they need on the host, and bring them to the device
                for each new prompt. On a CPU this waits for the model to move to a device.

        Raises:
            InputError: there are no such inputs, or a negative number of prompts is given.
        """
        if prompts < 0:
            raise InputError(f"cannot keep {prompts} prompts: 0 keeps none")
        hoist.find(self._fused, inputs)
        self._hoisted = _Hoisted(prompts, None if inputs is None else tuple(inputs), offload)
        self._fused = self._fused.to(self._device)
        self._lower(self._device)
        gc.collect()  # what ran until now is tied in cycles, and holds weights that may have moved

    @OriginalForward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; arguments and result are those of the original model.

        `torch.export.export` and `torch.compile` capture the whole program: they have no place to
        keep what belongs to a prompt.
        """
        signature = self.program.signature
        call = name_arguments(signature.parameters, signature.defaults, args, kwargs)
        if "return_dict" in signature.parameters and call.get("return_dict") is None:
            call["return_dict"] = True
        tensors = signature.bind((), call)
        if torch.compiler.is_exporting():
            leaves = self._whole(*tensors)
        else:
            with torch.no_grad():
                leaves = self._leaves(*tensors)
        return wrap_output(signature.unflatten(leaves), call)

    def _leaves(self, *tensors: torch.Tensor) -> Any:
        if self._loop is None or torch.compiler.is_compiling():
            return self._whole(*tensors)
        return self._loop(*tensors)

    def _whole(self, *tensors: torch.Tensor) -> Any:
        if self._is_away:
            raise InputError(
                "weights that only a new prompt needs are on the host, where a captured program "
                "would not find them: call hoist() before torch.export or torch.compile"
            )
        return self.lowered(*tensors)

    def check(
        self,
        inputs: Inputs | None = None,
        *,
        reference: torch.nn.Module | Program | None = None,
        limits: Limits | None = None,
    ) -> Check:
        """Compare with the original again; `print` the result, or ask it whether it `passed`.

        Args:
            inputs: one call of forward, by name, or several, by name or position. Without them it
                is the calls kept from compiling, with what the original did on them; a loaded
                model has none.
            reference: the original for `inputs`: a module, of which only the output is compared,
                for nothing says which of its values are those of this program; or a program of it
                from `trace`, with every site and block that this program still has. Fewer are left
                than were measured while compiling, before ops were fused: projections of one value
                are merged, and a block is told where it ends in a sum. Without a reference, only
                NaN, infinity, clipping and errors of their own are looked at.
            limits: what the figures are held to; those that the model was compiled within if not
                given. Nothing is raised where they are not kept.

        Raises:
            InputError: there is nothing to check on, or a call does not fit; or a LoRA is loaded,
                of which the calls kept from compiling know nothing.
        """
        if inputs is None and any(self.loras.values()):
            raise InputError("the calls kept from compiling know no LoRA: give inputs to check on")
        gate = self.report.gate
        held_to = limits or (gate.check.limits if gate else DEFAULT)
        program = self.program.to(self._device) if self._is_away else self.program
        return check_again(program, self._evidence, inputs, reference, held_to)

    def save(self, folder: str | Path) -> None:
        """Write the model to `folder`, for `wancompile.load`: weights in their 8 bits, no pickle.

        The folder appears whole or not at all, and may replace an older one.

        Raises:
            ArtifactError: something cannot be saved, the disk is full, or `folder` holds files that
                are no part of an artifact. A LoRA is loaded: it is a file of its own, or merged.
        """
        if self.loras:
            raise ArtifactError(
                f"a LoRA is no part of an artifact: unload {', '.join(self.loras)}, or merge it"
            )
        save(self._fused, self.report, self.config, self._dtype, folder)

    @property
    def _is_away(self) -> bool:
        return self._loop is not None and self._loop.away

    @property
    def fused(self) -> Program:
        """The program at level FUSED, which `save` writes and `program` is lowered from.

        It is the same for every device, and holds no LoRA but those that were merged.
        """
        return self._fused

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the original model's weights."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, those that `hoist` keeps on the host included."""
        return self.program.nbytes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move to the device that `fn` moves to; see the class for why types stay."""
        del recurse
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        if probe.dtype != self._dtype:
            raise TypeError(f"a compiled model keeps its types; it cannot become {probe.dtype}")
        if probe.device != self._device:
            self._fused = self._fused.to(probe.device)
            self._lower(probe.device)
        return self


@dataclass(frozen=True)
class _Hoisted:
    """The arguments of `CompiledModel.hoist`."""

    prompts: int = 2
    inputs: tuple[str, ...] | None = None
    offload: bool = False


def _device_of(program: Program) -> torch.device:
    return next(iter(program.state.values())).device


def warn_of_plain(lowered: Program, device: torch.device) -> None:
    """Say where a GPU computes 8-bit products without tensor cores: slower than bf16 does."""
    plain = Counter(
        match.target_name(node) for node in lowered.graph.nodes if node.target in _PRODUCTS
    )
    if device.type != "cuda" or not plain:
        return
    found = ", ".join(f"{count} x {name}" for name, count in plain.items())
    warnings.warn(
        f"no kernel fits, so plain PyTorch computes these, slower than the original does: {found}; "
        "the report says why",
        stacklevel=4,
    )
