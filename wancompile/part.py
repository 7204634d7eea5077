"""What a diffusers pipeline asks of its parts, and what a compiled one cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch

from wancompile.errors import PipelineError
from wancompile.unhooked import NoBlocks, check_attribute, refuse


class PipelinePart(torch.nn.Module):
    """A module that can take the place of a transformer in a pipeline; it keeps its types.

    Its `blocks` are there to say that it has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = NoBlocks()

    def __setattr__(self, name: str, value: Any) -> None:
        check_attribute(self, name, value)
        super().__setattr__(name, value)

    @property
    def dtype(self) -> torch.dtype:
        """The type that a pipeline casts inputs to."""
        raise NotImplementedError

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Yield the stored tensors, none of which can be trained.

        accelerate asks the first one where the model is, others how many numbers it has.
        """
        return cast(Iterator[torch.nn.Parameter], self.buffers(recurse))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, or raise `TypeError` where a type is asked for.

        But `to(device, dtype)`, by which a pipeline converts all its parts, moves and warns, as
        diffusers does for other quantized parts: an error would leave the pipeline half converted.
        The pipeline goes on casting inputs to `dtype`.
        """
        if len(args) != 2 or args[1] in (None, self.dtype):
            return super().to(*args, **kwargs)
        warnings.warn(
            f"a compiled model keeps its types: it does not become {args[1]}", stacklevel=2
        )
        return self if args[0] is None else super().to(args[0])

    @contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Do nothing: diffusers pipelines name conditional and unconditional calls and steps so."""
        del args, kwargs
        yield

    def enable_cache(self, config: object) -> NoReturn:
        """Raise `PipelineError`: diffusers' caches hook into blocks, which a graph has no more.

        diffusers' functions that take a model and a config raise it, too, but for
        `apply_pyramid_attention_broadcast`: it looks for attentions by their class, finds none, and
        says nothing.
        """
        refuse(type(config).__name__)

    def load_lora_adapter(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise `PipelineError`: diffusers puts LoRAs into modules, which a graph has no more."""
        del args, kwargs
        raise PipelineError(
            "diffusers cannot load a LoRA into a compiled model: use its `load_lora`, or that of "
            "the compiled pipeline"
        )

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise `PipelineError`: diffusers could not read it."""
        del args, kwargs
        raise PipelineError(
            "a compiled model cannot be saved for diffusers: use its `save`, and wancompile.load"
        )
