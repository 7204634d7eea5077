"""What a compiled model can do with LoRAs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from wancompile.errors import LoraError
from wancompile.lora.adapter import Adapter, parse
from wancompile.lora.branches import Branches, Lora, Loras
from wancompile.lora.files import Stored, read
from wancompile.lora.merge import merge
from wancompile.lora.places import fitting
from wancompile.program import Program


class TakesLoras:
    """The part of a compiled model that is about LoRAs.

    Whoever inherits this has a FUSED program, lowers it, and runs the programs that it is told to.
    """

    _fused: Program
    _base: Program  # `_fused`, lowered
    _branches: Branches
    _device: torch.device
    _dtype: torch.dtype

    @property
    def loras(self) -> dict[str, float]:
        """The scale of each LoRA that is loaded, by its name."""
        return {name: lora.scale for name, lora in self._branches.loras.items()}

    def load_lora(
        self, lora: Stored, *, name: str = "default", scale: float = 1.0, strict: bool = True
    ) -> None:
        """Put a LoRA beside the weights; nothing is calibrated, exported or compiled for that.

        Each linear that it changes gets a branch of low rank, which reads the 8 bits that the
        linear reads and is computed in the model's own type. A LoRA that needs no more room than
        those before it, whether they are still loaded or not, is copied into theirs.

        Args:
            lora: a safetensors file, or what is in one, with the names of diffusers or PEFT, of the
                original Wan (ComfyUI) or of Kohya's tools. Of A14B it is that of this expert; a
                `CompiledPipeline` tells them apart.
            name: what `set_lora` and `unload_lora` call it; one of that name is replaced.
            scale: how much of it is added, times alpha / rank where the LoRA has an alpha.
            strict: whether a linear that this model has not is an error; if not, it is left out,
                but one of them must be there.

        Raises:
            LoraError: with the name, where it is broken or of another model. The model, and the
                LoRAs that it has, are then as they were.
        """
        add(self, fit(self, lora, strict=strict), name, scale)

    def set_lora(self, scales: Mapping[str, float]) -> None:
        """Say how much of each loaded LoRA is added; of those not named, nothing.

        Where nothing at all is added, the model computes the same bits as without LoRAs.

        Raises:
            LoraError: there is no LoRA of that name, or a scale is no finite number.
        """
        loaded = self._branches.loras
        for name in scales:
            self._need(name)
        self._have({
            name: Lora(lora.adapter, _number(name, scales.get(name, 0.0)))
            for name, lora in loaded.items()
        })  # fmt: skip

    def unload_lora(self, name: str) -> None:
        """Take a LoRA away. The room that it had stays for the next one.

        Raises:
            LoraError: there is no LoRA of that name.
        """
        self._need(name)
        self._have({one: lora for one, lora in self._branches.loras.items() if one != name})

    def merge_lora(
        self,
        lora: Stored,
        *,
        scale: float = 1.0,
        reference: torch.nn.Module | None = None,
        strict: bool = True,
    ) -> None:
        """Round the weights anew with a LoRA in them, for good; it costs nothing at run time.

        `save` then saves it as well. What was calibrated stays: smooth scales, and the ranges that
        8-bit attention and static scales have.

        Args:
            lora: as for `load_lora`.
            scale: as for `load_lora`.
            reference: the original model, without the LoRA. Without it, weights that were rounded
                are rounded a second time, which costs about as much accuracy as the first. Ranges
                that were clipped and GPTQ are not kept for weights that the LoRA changes.
            strict: as for `load_lora`.

        Raises:
            LoraError: as for `load_lora`, or `reference` is another model.
            NumericsError: a weight becomes infinite.
        """
        merge_into(self, fit(self, lora, strict=strict), scale, reference)

    def _need(self, name: str) -> None:
        known = self._branches.loras
        if name not in known:
            raise LoraError(f"no LoRA {name!r} is loaded; there are: {', '.join(known) or 'none'}")

    def _have(self, loras: Loras) -> None:
        self._run(self._branches.load(self._fused, loras, self._device, self._dtype) or self._base)

    def _lower(self, device: torch.device) -> None:
        """Lower `_fused` for `device`, with the LoRAs that are loaded."""
        raise NotImplementedError

    def _run(self, program: Program) -> None:
        """Run `program` from now on, whose numbers may have changed if it did so before."""
        raise NotImplementedError


# The steps of these methods, for whoever has several models and must know that all of them can take
# a step before one does.


def fit(model: TakesLoras, lora: Stored, *, strict: bool = True) -> Adapter:
    """Return a LoRA by the paths of the model's linears, which it fits; nothing is loaded.

    Raises:
        LoraError: as for `load_lora`.
    """
    return fitting(parse(read(lora)), model._branches.places, strict=strict)


def add(model: TakesLoras, adapter: Adapter, name: str, scale: float) -> None:
    """Do what `load_lora` does with what `fit` returned."""
    lora = Lora(adapter, _number(name, scale))
    with restoring(model):
        model._have({**model._branches.loras, name: lora})


def merge_into(
    model: TakesLoras, adapter: Adapter, scale: float, reference: torch.nn.Module | None
) -> None:
    """Do what `merge_lora` does with what `fit` returned."""
    scale = _number("the LoRA", scale)
    with restoring(model):
        whole = model._fused.to(model._device)
        model._fused = merge(whole, model._branches.places, adapter, scale, reference)
        model._lower(model._device)


@contextmanager
def restoring(model: TakesLoras) -> Iterator[None]:
    """Have weights and LoRAs as they were if what is done inside does not succeed.

    Until then the weights that are merged into are there twice.
    """
    fused, loras = model._fused, model._branches.loras
    try:
        yield
    except BaseException:
        if model._fused is not fused:
            model._fused = fused
            model._lower(model._device)
        if model._branches.loras is not loras:
            model._have(loras)
        raise


def _number(name: str, scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise LoraError(f"the scale of {name} is a finite number, not {scale!r}")
    return float(scale)
