"""What the small Wans are conditioned on: words as text states, a first frame as image states.

Both encoders are fixed functions, no networks: a real text encoder would outweigh the model a
thousandfold. What matters to a compiler is kept: text states are zero-padded to 512 tokens of which
a handful say something, and image states are another modality with statistics of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT_TOKENS = 512
TEXT_DIM = 64
PATCH = 4
IMAGE_DIM = 2 * PATCH * PATCH
END = "</s>"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "the digit {}",
    "a handwritten {}",
    "a handwritten {} that moves and bounces",
    "a video of the digit {} bouncing off the walls",
)
_WORDS = (END, *sorted({word for one in TEMPLATES for word in one.split()} - {"{}"}), *DIGITS)
_VOCABULARY = {word: index for index, word in enumerate(_WORDS)}


def prompt(digit: int, template: int = 3) -> str:
    """Return a prompt that asks for `digit`, 0 to 9, in one of the `TEMPLATES`."""
    return TEMPLATES[template].format(DIGITS[digit])


def text_states(prompts: Sequence[str]) -> Tensor:
    """Return `[len(prompts), 512, 64]` fp32: a vector a word, an end mark, then zeros.

    The empty prompt is the unconditional one. A word is a fixed random vector plus the code of its
    position.

    Raises:
        KeyError: a word that the models have never seen.
    """
    table = torch.randn(len(_WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(17))
    states = torch.zeros(len(prompts), TEXT_TOKENS, TEXT_DIM)
    for row, text in enumerate(prompts):
        words = [_VOCABULARY[word] for word in (*text.split(), END)]
        states[row, : len(words)] = table[words] + _position_code(len(words), TEXT_DIM)
    return states


def image_states(frames: Tensor) -> Tensor:
    """Return `[B, (H / 4) (W / 4), 32]`: the patches of `frames [B, 1, H, W]`, and where they are.

    Half of the channels are the 16 pixels of a patch, the other half the code of its position.
    """
    pixels = F.pixel_unshuffle(frames, PATCH).flatten(2).transpose(1, 2)
    code = _position_code(pixels.shape[1], IMAGE_DIM - pixels.shape[2])
    return torch.cat([pixels, code.to(pixels).expand(len(pixels), -1, -1)], -1)


def _position_code(length: int, width: int) -> Tensor:
    """Sines and cosines `[length, width]` (Vaswani et al. 2017, "Attention is all you need")."""
    rates = torch.exp(-math.log(1000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)
