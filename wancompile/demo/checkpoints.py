"""The two trained models that ship with the package, and first frames for the one that wants them.

`t2v` makes a video from a prompt, `i2v` from a prompt and a first frame; `training/` made both.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wancompile import presets

Name = Literal["t2v", "i2v"]
NAMES: tuple[Name, ...] = ("t2v", "i2v")


def load(name: Name) -> nn.Module:
    """Return a trained model in fp32 and eval mode; its weights were stored in bf16."""
    with as_file(files("wancompile.demo") / "weights" / name) as folder:
        return presets.load(folder, dtype=torch.float32)


def first_frame(digit: int) -> Tensor:
    """Return `[1, 1, 24, 24]` in [-1, 1]: a handwritten digit that no model was trained on."""
    with as_file(files("wancompile.demo") / "weights" / "first_frames.safetensors") as file:
        return load_file(file)["frames"][digit : digit + 1]
