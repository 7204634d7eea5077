"""What the gate lets pass."""

from __future__ import annotations

from dataclasses import dataclass, fields

from wancompile.errors import InputError


@dataclass(frozen=True)
class Limits:
    """The largest figures with which a compiled model is let through; each may be infinity.

    All errors are relative L2, `|actual - expected| / |expected|`, and all but `own` are measured
    against the original from the input of the model on, so that they accumulate.

    The defaults lie between what is healthy and what is broken, nearer to the former. Measured were
    both trained checkpoints, as they are and with outlier channels, on three denoising steps of a
    held-out video, with and without the prompt. Healthy is the largest figure of the four recipes
    by name, broken the smallest of int8 without smoothing on outlier channels.

    | figure    | healthy | broken |
    |-----------|---------|--------|
    | `own`     |   6.1 % |   59 % |
    | `site`    |  11.8 % |  107 % |
    | `block`   |   5.8 % |   59 % |
    | `output`  |   3.7 % |   39 % |
    | `clipped` |  0.07 % |        |

    With random weights in three layers of the largest model and attention in 8 bits, the output is
    7 % off.

    Attributes:
        own: error that a group of linears, or an 8-bit attention, makes by itself: of a group on
            sampled tokens that did not choose its smooth scale, of an attention on the operands
            that it gets.
        site: error of the output of one linear or attention, over all calls together.
        block: error of the values that leave a repeated block, over all calls together.
        output: error of the output of the model, on each call.
        clipped: share of the values of an operand with a calibrated scale that got the largest
            code of its type.
        broken: NaN and infinite values where the original has none.

    Raises:
        InputError: a limit is no number, or below 0.
    """

    own: float = 0.15
    site: float = 0.35
    block: float = 0.15
    output: float = 0.10
    clipped: float = 0.01
    broken: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise InputError(f"the limit {field.name} is a number from 0 on, not {value!r}")


DEFAULT = Limits()
