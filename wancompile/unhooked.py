"""What others hook into a model from outside, refused where a compiled one is reached for.

Caches, guiders and offloading replace the forward of blocks, attentions or layers. The graph of a
compiled model has none, so they would find nothing, and most would not say so. There is no method
to be overridden: they look for attributes and children. Some of these are here, to say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from wancompile.errors import PipelineError

# Where diffusers keeps its hooks of a module, and accelerate its own.
_DIFFUSERS = "_diffusers_hook"
_ACCELERATE = "_hf_hook"

# accelerate's hook that moves tensors of layers, each as it runs; others move the whole model.
_MOVES_LAYERS = "AlignDevicesHook"

# As diffusers' patterns of names know them: `blocks.0.attn1`.
_PLACES = ("attn", "attn1", "attn2", "ffn")


def refuse(what: str) -> NoReturn:
    """Raise `PipelineError` for `what`, which someone wanted to use."""
    raise PipelineError(
        f"{what} cannot be used with a compiled model: caches, guiders and offloading layer by "
        "layer hook into blocks and attentions, and its graph has none; every step is computed, "
        "whatever else finds nothing to hook into and does not say so"
    )


def check_attribute(module: nn.Module, name: str, value: object) -> None:
    """Refuse the attribute by which a hook is kept; `module` is then without that hook.

    Raises:
        PipelineError: `value` is the hooks of diffusers, or one of accelerate for layers.
    """
    if name == _DIFFUSERS:
        refuse("a hook of diffusers")
    if name == _ACCELERATE and _moves_layers(value):
        vars(module).pop("_old_forward", None)  # set just before the hook
        raise PipelineError(
            f"{_MOVES_LAYERS}, which enable_sequential_cpu_offload sets, moves layers one by one, "
            "and a compiled model has a graph: call pipe.remove_all_hooks(), then "
            "pipe.enable_model_cpu_offload(), which moves it whole"
        )


def _moves_layers(hook: object) -> bool:
    """Whether `hook` is accelerate's for layers, or holds one in a row of several."""
    several = getattr(hook, "hooks", (hook,))
    return any(type(one).__name__ == _MOVES_LAYERS for one in several)


class NoBlocks(nn.ModuleList):
    """Stands where a transformer has its blocks; it holds no tensor, and nothing runs it.

    Going through it, or hooking into what it seems to hold, is a `PipelineError`.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.add_module("0", _NoBlock(_PLACES))

    def __iter__(self) -> Iterator[nn.Module]:
        refuse("what loops over blocks")

    def __getitem__(self, index: Any) -> NoReturn:
        refuse("what loops over blocks")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _NoBlock(nn.Module):
    """A name to be found by; it refuses hooks."""

    def __init__(self, children: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name in children:
            self.add_module(name, _NoBlock())

    def __setattr__(self, name: str, value: torch.Tensor | nn.Module) -> None:
        check_attribute(self, name, value)
        super().__setattr__(name, value)
