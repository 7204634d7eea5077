"""Pipelines as tests drive them: what is asked of them, and what must stay as it was."""

from __future__ import annotations

import pipes
from functools import cache
from typing import Any

from wancompile.experts.pipe import denoisers

STEPS = 3


def asked(kind: str, seed: int = 0, **changed: Any) -> dict[str, Any]:
    return {**pipes.arguments(kind, steps=STEPS, seed=seed), **changed}


@cache
def original(kind: str) -> Any:
    return pipes.make(kind)


class Unchanged:
    """What of a pipeline must be as it was."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._parts = dict(pipe.components)
        self._own = {name: dict(vars(part)) for name, part in denoisers(pipe).items()}
        self._config = dict(pipe.config)

    def check(self) -> None:
        assert all(self._pipe.components[name] is part for name, part in self._parts.items())
        for name, part in denoisers(self._pipe).items():
            assert vars(part).keys() == self._own[name].keys()
        assert dict(self._pipe.config) == self._config
        assert "save_pretrained" not in vars(self._pipe)
