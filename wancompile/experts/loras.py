"""LoRAs on the compiled experts of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from wancompile.compiled import CompiledModel
from wancompile.errors import LoraError, of_expert
from wancompile.lora.adapter import Adapter
from wancompile.lora.files import PARTS, Stored, split
from wancompile.lora.model import add, fit, merge_into, restoring

Given = Stored | Mapping[str, Stored]
"""A LoRA, or one for each expert by its name."""

Reference = torch.nn.Module | Mapping[str, object]
"""An original, or several by the names of the experts, as the `components` of a pipeline are."""


class ExpertsTakeLoras:
    """The part of a `CompiledPipeline` that is about LoRAs.

    Each method does what that of `CompiledModel` does, for the experts that it is about. Where one
    of them cannot, all are as they were.
    """

    experts: dict[str, CompiledModel]

    @property
    def loras(self) -> dict[str, dict[str, float]]:
        """The scale of each LoRA by its name, for each expert."""
        return {name: model.loras for name, model in self.experts.items()}

    def load_lora(
        self,
        lora: Given,
        *,
        name: str = "default",
        scale: float = 1.0,
        expert: str | None = None,
        strict: bool = True,
    ) -> None:
        """Put a LoRA beside the weights of the experts that it is for.

        Args:
            lora: as for `CompiledModel.load_lora`; of two experts each gets what is named after it,
                as `transformer_2.blocks.0...` is. A dict gives each expert named its own.
            name: what `set_lora` and `unload_lora` call it; one of that name is replaced where this
                one goes.
            scale: as for `CompiledModel.load_lora`.
            expert: which one it is for, where the LoRA does not say so: files for ComfyUI do not.
            strict: as for `CompiledModel.load_lora`.

        Raises:
            LoraError: as for `CompiledModel.load_lora`; or it is for an expert that is not there,
                or may be for either.
        """
        adapters = self._adapters(lora, expert, strict=strict)
        with ExitStack() as stack:
            for at, adapter in adapters.items():
                stack.enter_context(restoring(self.experts[at]))
                with of_expert(at):
                    add(self.experts[at], adapter, name, scale)

    def set_lora(self, scales: Mapping[str, float], *, expert: str | None = None) -> None:
        """Say how much of each loaded LoRA is added; of those not named, nothing.

        Args:
            scales: by the name of the LoRA, in every expert that has it.
            expert: the one that this is about; the others are then left as they are.

        Raises:
            LoraError: there is no LoRA or no expert of that name, or a scale is no finite number.
        """
        about = self._about(expert)
        self._need(scales, about)
        with ExitStack() as stack:
            for at in about:
                model = self.experts[at]
                stack.enter_context(restoring(model))
                with of_expert(at):
                    model.set_lora({one: scales[one] for one in scales if one in model.loras})

    def unload_lora(self, name: str, *, expert: str | None = None) -> None:
        """Take a LoRA away from every expert that has it, or from one of them.

        Raises:
            LoraError: there is no LoRA or no expert of that name.
        """
        about = self._about(expert)
        self._need([name], about)
        with ExitStack() as stack:
            for model in (self.experts[at] for at in about):
                stack.enter_context(restoring(model))
                if name in model.loras:
                    model.unload_lora(name)

    def merge_lora(
        self,
        lora: Given,
        *,
        scale: float = 1.0,
        reference: Reference | None = None,
        expert: str | None = None,
        strict: bool = True,
    ) -> None:
        """Round the weights of the experts that a LoRA is for anew with it in them, for good.

        Until all of them are done, what they were is kept in memory.

        Args:
            lora: as for `load_lora`.
            scale: as for `load_lora`.
            reference: the original of the expert that the LoRA is for, or of several by name, such
                as `pipe.components` of the pipeline as it was loaded; see `CompiledModel`.
            expert: as for `load_lora`.
            strict: as for `load_lora`.

        Raises:
            LoraError: as for `load_lora`, or a reference is missing, or of another model.
            NumericsError: a weight becomes infinite.
        """
        adapters = self._adapters(lora, expert, strict=strict)
        originals = _originals(reference, list(adapters))
        with ExitStack() as stack:
            for at, adapter in adapters.items():
                stack.enter_context(restoring(self.experts[at]))
                with of_expert(at):
                    merge_into(self.experts[at], adapter, scale, originals[at])

    def _adapters(self, lora: Given, expert: str | None, *, strict: bool) -> dict[str, Adapter]:
        """Return what each expert gets, all of which fits."""
        given = self._given(lora, expert, strict=strict)
        found = {}
        for at, tensors in given.items():
            with of_expert(at):
                found[at] = fit(self.experts[at], tensors, strict=strict)
        return found

    def _given(self, lora: Given, expert: str | None, *, strict: bool) -> dict[str, Stored]:
        by_expert = _by_expert(lora)
        if by_expert is not None:
            if expert is not None:
                raise LoraError("give a LoRA for each expert by its name, or expert=, not both")
            self._about(*by_expert)
            return {at: _for(at, split(one, self._parts)) for at, one in by_expert.items()}
        parts = split(cast(Stored, lora), self._parts)
        if expert is not None:
            self._about(expert)
            return {expert: _for(expert, parts)}
        if "" not in parts:
            return self._of_parts(parts)
        if len(parts) > 1:
            raise LoraError(
                f"some names of this LoRA begin with {' or '.join(filter(None, parts))} and others "
                "with no part of the pipeline: pass expert=..."
            )
        return {self._only(parts[""], strict=strict): parts[""]}

    def _of_parts(self, parts: dict[str, dict[str, Tensor]]) -> dict[str, Stored]:
        """Return what is named after an expert for that expert, if there is one for all of it."""
        missing = [part for part in parts if part not in self.experts]
        if len(self.experts) == 1 and missing == list(parts) == [PARTS[0]]:
            return dict.fromkeys(self.experts, parts[PARTS[0]])  # by another name
        if missing:
            there = next((at for at in self.experts if at in parts), "")
            advice = f'; expert="{there}" loads what there is for {there} alone' if there else ""
            raise LoraError(
                f"this LoRA is for {' and '.join(parts)}, but the pipeline has no {missing[0]}: it "
                f"has {' and '.join(self.experts)}{advice}"
            )
        return dict(parts)

    def _only(self, lora: Stored, *, strict: bool) -> str:
        """Return the one expert that fits a LoRA which does not say which it is for.

        Raises:
            LoraError: none does, with what is wrong for the first; or several do.
        """
        failures, fits = [], []
        for at, model in self.experts.items():
            try:
                with of_expert(at if len(self.experts) == 1 else ""):
                    fit(model, lora, strict=strict)
                fits.append(at)
            except LoraError as error:
                failures.append(error)
        if len(fits) == 1:
            return fits[0]
        if not fits and len(failures) == 1:
            raise failures[0]
        names = list(self.experts)
        if not fits:
            raise LoraError(f"this LoRA fits none of {', '.join(names)}: {failures[0].reason}")
        raise LoraError(
            f"this LoRA does not say which expert it is for, and fits {' and '.join(fits)}: pass "
            f'expert="{fits[0]}" or expert="{fits[1]}", or a dict that gives each its own'
        )

    @property
    def _parts(self) -> tuple[str, ...]:
        """What names in a LoRA may begin with."""
        return tuple(dict.fromkeys((*self.experts, *PARTS)))

    def _about(self, *asked: str | None) -> tuple[str, ...]:
        """Return the experts of these names, all of them for None."""
        unknown = [name for name in asked if name is not None and name not in self.experts]
        if unknown:
            raise LoraError(
                f"the pipeline has no expert {unknown[0]!r}, but {', '.join(self.experts)}"
            )
        named = tuple(name for name in asked if name is not None)
        return named or tuple(self.experts)

    def _need(self, names: Iterable[str], about: Iterable[str]) -> None:
        known = {lora for at in about for lora in self.experts[at].loras}
        for name in names:
            if name not in known:
                there = ", ".join(sorted(known)) or "none"
                raise LoraError(f"no LoRA {name!r} is loaded; there are: {there}")


def _by_expert(lora: Given) -> Mapping[str, Stored] | None:
    """Return `lora` if it is several of them, which tensors by their names are not."""
    if not isinstance(lora, Mapping) or not lora:
        return None
    several = all(isinstance(one, (str, Path, Mapping)) for one in lora.values())
    return cast(Mapping[str, Stored], lora) if several else None


def _for(expert: str, parts: dict[str, dict[str, Tensor]]) -> Stored:
    """Return what of a LoRA is for an expert that was asked for by name."""
    if expert in parts:
        return parts[expert]
    (part, tensors), *others = parts.items()
    # diffusers writes `transformer` for whichever expert it was trained on.
    if others or part not in ("", PARTS[0]):
        raise LoraError(f"this LoRA is for {' and '.join(filter(None, parts))}, not for {expert}")
    return tensors


def _originals(
    reference: Reference | None, experts: list[str]
) -> dict[str, torch.nn.Module | None]:
    if reference is None:
        return dict.fromkeys(experts)
    if isinstance(reference, torch.nn.Module):
        if len(experts) > 1:
            raise LoraError(f"the LoRA is for {' and '.join(experts)}: give a reference for each")
        return {experts[0]: reference}
    found: dict[str, torch.nn.Module | None] = {}
    for at in experts:
        original = reference.get(at)
        if not isinstance(original, torch.nn.Module):
            raise LoraError(f"the references hold no model for the expert {at}")
        found[at] = original
    return found
