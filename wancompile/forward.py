"""The forward of a compiled model, with the parameters of the original's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from wancompile.program import Program


class Runs(Protocol):
    """Whatever runs a program."""

    program: Program


class OriginalForward:
    """A method whose parameters, for whoever inspects it, are those of the traced model.

    torch.export needs them to know which dimensions of which argument are open, and pipelines ask
    what a transformer takes. Not the method itself: it is one for all models, of any parameters.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self.__doc__ = run.__doc__

    def __get__(self, model: Runs | None, owner: type) -> Callable[..., Any]:
        if model is None:
            return self._run
        bound: Any = partial(self._run, model)
        if not torch.compiler.is_dynamo_compiling():  # dynamo would have to trace this line
            bound.__signature__ = model.program.signature.inspected
        return bound  # type: ignore[no-any-return]
