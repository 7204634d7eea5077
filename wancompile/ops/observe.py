"""Streaming observers: they write statistics of the tensors that pass into buffers given to them.

Nothing here makes the host wait for the device. The buffers are declared as mutated, so dead code
elimination keeps the nodes although they return nothing.

What costs time is reading x, which at full size is a third of a gigabyte: twice for the maxima and
once, with its own shifted rows out of the cache, to find equal rows. All else is a few numbers a
row.
"""

import math

import torch
from torch import Tensor

from wancompile.ops.check import require
from wancompile.ops.hadamard import check_hadamard, turned
from wancompile.quant.numerics import absmax


@torch.library.custom_op(
    "wancompile::observe_channels", mutates_args=("amax", "count", "sample", "priority")
)
def observe_channels(
    x: Tensor,
    amax: Tensor,
    count: Tensor,
    sample: Tensor,
    priority: Tensor,
    label: Tensor,
    seed: int,
) -> None:
    """Record per-channel maxima and a uniform sample of the rows of `x`.

    A row equal, bit for bit, to the one before it (in the same batch element) counts once and is
    sampled at most once, because text is padded with hundreds of equal rows that would crowd out
    the words.

    Args:
        x: `[..., C]`, any float dtype. Its rows are the tokens; dims before the last two are batch.
        amax: `[L, C]` fp32, starts at 0. Line `label` rises to the largest magnitude of every
            channel. A NaN stays NaN for good.
        count: `[L]` int64, starts at 0. Line `label` grows by the distinct rows.
        sample: `[R, C]`, any float dtype. Row i is meaningful where `priority[i]` is finite.
        priority: `[R]` float, starts at +infinity, ascending. float64 has no ties in practice.
        label: int64 scalar tensor, which line of `amax` and `count` this call belongs to.
        seed: picks the sample. Distinct row number n, over all labels, gets the pseudo-random
            priority `hash(seed, n)`, and the R smallest are kept (bottom-k sampling, Cohen & Kaplan
            2007). The same rows in the same order give the same sample however they are batched,
            and two samples with different seeds merge into the R smallest of both.
    """
    _check_channels(x, amax, count, sample, priority, label)
    line = label.reshape(1)
    rows = x.reshape(-1, x.shape[-1])
    _raise_line(amax, line, absmax(rows, 0))
    fresh = _differs_from_previous(x)
    number = count.sum() + fresh.cumsum(0) - 1
    drawn = _uniform(number, seed).masked_fill_(~fresh, torch.inf)
    count.index_add_(0, line, fresh.sum().reshape(1))
    _keep_lowest(sample, priority, rows, drawn.to(priority.dtype))


@observe_channels.register_fake
def fake_observe_channels(
    x: Tensor,
    amax: Tensor,
    count: Tensor,
    sample: Tensor,
    priority: Tensor,
    label: Tensor,
    seed: int,
) -> None:
    """Checks only: `observe_channels` returns nothing."""
    _check_channels(x, amax, count, sample, priority, label)


@torch.library.custom_op("wancompile::observe_heads", mutates_args=("low", "high"))
def observe_heads(x: Tensor, low: Tensor, high: Tensor, label: Tensor, is_turned: bool) -> None:
    """Record the range of `x` over tokens, if `is_turned` that of its Hadamard transform.

    Per channel, not per head: smoothing scales the channels of v after it was observed, and from
    each channel of k the middle of its range may be subtracted.

    Args:
        x: `[B, H, S, D]`, any float dtype.
        low: `[L, H, D]` fp32, starts at +infinity. Line `label` falls to the smallest values. A NaN
            stays NaN for good.
        high: `[L, H, D]` fp32, starts at -infinity. Line `label` rises to the largest values.
        label: int64 scalar tensor.
        is_turned: multiply x by the matrix of `hadamard` first; D is then a power of two.
    """
    _check_heads(x, low, high, label)
    if is_turned:
        check_hadamard(x)
        x = turned(x.to(torch.float32))
    line = label.reshape(1)
    _raise_line(high, line, x.amax((0, 2)))
    lowered = torch.minimum(low.index_select(0, line), x.amin((0, 2)).to(low.dtype))
    low.index_copy_(0, line, lowered)


@observe_heads.register_fake
def fake_observe_heads(
    x: Tensor, low: Tensor, high: Tensor, label: Tensor, is_turned: bool
) -> None:
    """Checks only: `observe_heads` returns nothing."""
    _check_heads(x, low, high, label)
    if is_turned:
        check_hadamard(x)


def _raise_line(amax: Tensor, line: Tensor, values: Tensor) -> None:
    # Plain indexing with a scalar tensor reads it on the host; index_select and index_copy_ do not.
    raised = torch.maximum(amax.index_select(0, line), values.to(amax.dtype))
    amax.index_copy_(0, line, raised)


def _differs_from_previous(x: Tensor) -> Tensor:
    """Bool `[rows]`: False where a row of `x [..., S, C]` equals the row before it."""
    tokens = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x.reshape(1, 1, -1)
    fresh = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
    words = _words(tokens)
    torch.any(words[:, 1:] != words[:, :-1], -1, out=fresh[:, 1:])
    return fresh.flatten()


def _words(tokens: Tensor) -> Tensor:
    """The bits of each row as integers, the longest that fit, so that few answers are written."""
    tokens = tokens.contiguous()
    start = tokens.storage_offset() * tokens.element_size()
    row = tokens.shape[-1] * tokens.element_size()
    size = math.gcd(8, start, row)
    return tokens.view(_INTEGERS[size])


def _keep_lowest(sample: Tensor, priority: Tensor, rows: Tensor, drawn: Tensor) -> None:
    size = sample.shape[0]
    best, index = drawn.topk(min(size, rows.shape[0]), largest=False)
    entrants = rows.index_select(0, index).to(sample.dtype)
    kept, order = torch.cat([priority, best]).topk(size, largest=False)
    sample.copy_(torch.cat([sample, entrants]).index_select(0, order))
    priority.copy_(kept)


def _uniform(number: Tensor, seed: int) -> Tensor:
    """float64 in [0, 1) from int64 counters: SplitMix64 (Steele, Lea & Flood 2014).

    int64 products wrap, as the generator wants it; only right shifts have to be made logical.
    """
    state = (number + 1) * _signed(0x9E3779B97F4A7C15) + _signed(_mix(seed))
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX1)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX2)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_MIX1, _MIX2, _MASK = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def _mix(word: int) -> int:
    """SplitMix64's finalizer on a Python int, so that neighbouring seeds start far apart."""
    word &= _MASK
    word = (word ^ word >> 30) * _MIX1 & _MASK
    word = (word ^ word >> 27) * _MIX2 & _MASK
    return word ^ word >> 31


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _check_channels(
    x: Tensor, amax: Tensor, count: Tensor, sample: Tensor, priority: Tensor, label: Tensor
) -> None:
    fits = x.dim() >= 1 and amax.dim() == sample.dim() == 2 and label.dtype == torch.int64
    fits = fits and amax.shape[1] == sample.shape[1] == x.shape[-1] and label.numel() == 1
    fits = fits and amax.dtype == torch.float32
    fits = fits and count.dtype == torch.int64 and count.shape == amax.shape[:1]
    fits = fits and priority.is_floating_point() and priority.shape == sample.shape[:1]
    need = (
        "x float[..., C], amax float32[L, C], count int64[L], sample float[R, C], "
        "priority float[R], label int64[]"
    )
    require(fits, "observe_channels", need, x, amax, count, sample, priority, label)


def _check_heads(x: Tensor, low: Tensor, high: Tensor, label: Tensor) -> None:
    fits = x.dim() == 4 and high.dim() == 3 and high.shape[1:] == (x.shape[1], x.shape[3])
    fits = fits and label.dtype == torch.int64 and label.numel() == 1
    fits = fits and low.dtype == high.dtype == torch.float32 and low.shape == high.shape
    need = "x float[B, H, S, D], low and high float32[L, H, D], label int64[]"
    require(fits, "observe_heads", need, x, low, high, label)
