"""Compiled models as files that other programs read.

    diffusers              weights in floating point, for `from_pretrained`
    modelopt               e4m3 with a scale per output channel, under diffusers' names
    comfyui-scaled-fp8     e4m3 with a scale per tensor, under the names of the original Wan

What these formats cannot say is undone: smooth scales leave the weights they were folded into, and
8-bit attention and fused ops are not theirs to know. So such a file holds the weights of the
compiled model, rounded once more where the format needs it, and not its arithmetic on activations.
How far each weight is from what the compiled model has is in the `Summary`.
"""

from wancompile.interchange.formats import FORMATS
from wancompile.interchange.writer import Summary, write

__all__ = ["FORMATS", "Summary", "write"]
