"""The Wan models by name: their configurations and inputs of the right shapes, without weights."""

from wancompile.presets.build import build
from wancompile.presets.folder import from_folder, load
from wancompile.presets.inputs import example_inputs
from wancompile.presets.preset import Latent, Preset
from wancompile.presets.shrink import tiny, truncated
from wancompile.presets.table import PRESETS, find

__all__ = [
    "PRESETS",
    "Latent",
    "Preset",
    "build",
    "example_inputs",
    "find",
    "from_folder",
    "load",
    "tiny",
    "truncated",
]
