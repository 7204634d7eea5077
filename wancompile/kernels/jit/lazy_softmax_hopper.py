"""An online softmax for Hopper whose exponentials do not wait for the maximum of their block.

Rows have a shift, as of an older maximum, and a weight is `2**(logit * factor - shift)`. What is
made with one shift stays right whatever comes later, as long as no weight exceeds 448, the largest
e4m3. If one would, the shifts of the warp's rows are raised to their maxima so far, which then have
weights of `2**BITS`, and what was made with the old shifts is made again or multiplied. So the
maximum of a block is only looked for to find out whether there is such a weight, by each thread in
the values that it has, while the unit of exponentials works.

With few bits shifts are raised rarely, but small weights lose precision early: those below
`2**-(6 + BITS)` of the largest are subnormal in e4m3, and below `2**-(10 + BITS)` they are 0. In a
model of these rules in fp32, on 32,768 normal logits of standard deviation 1, 2, 4, groups of 64
rows raise shifts in 24, 28, 37 % of steps with 8 bits, 11, 18, 29 % with 7, and 3, 11, 22 % with 6.
The errors are 2.7, 2.2, 1.3 % with 7 bits and 2.6, 2.0, 0.9 % for weights of 256 at the maximum,
mostly since the weight of the maximum itself is rounded, too, unless shifts were just raised.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from wancompile.kernels.jit.softmax_hopper import (
    ROWS,
    float_bits,
    online_softmax,
    operands,
    power_of_two,
    product_layout,
    spread,
    thread_maxima,
    thread_sums,
)
from wancompile.quant.numerics import FP8, QMAX

_LIMIT = math.log2(QMAX[FP8])


def _raise_asm(bits: int) -> str:
    """The shifts of a thread's two rows, and whether one of the warp was raised.

    Arguments are the largest logits of the thread, shifts, factors and negative shifts. The four
    threads of a row exchange their maxima only if some weight of the warp is too large. Then all
    its rows may raise their shifts, so that it happens less often.
    """
    return "\n".join([
        "{ .reg .pred high, any; .reg .f32 weight, top, other;",
        "fma.rn.f32 weight, $4, $8, $10;",
        "fma.rn.f32 other, $5, $9, $11;",
        "max.f32 weight, weight, other;",
        f"setp.gt.f32 high, weight, {float_bits(_LIMIT)};",
        "vote.sync.any.pred any, high, 0xffffffff;",
        "selp.b32 $2, 1, 0, any; mov.b32 $3, $2;",
        "mov.f32 $0, $6; mov.f32 $1, $7;",
        "@!any bra.uni done;",
        *(_raise_row_asm(row, bits) for row in (0, 1)),
        "done: }",
    ])  # fmt: skip


def _raise_row_asm(row: int, bits: int) -> str:
    return f"""mov.f32 top, ${4 + row};
        shfl.sync.bfly.b32 other, top, 1, 0x1f, 0xffffffff;
        max.f32 top, top, other;
        shfl.sync.bfly.b32 other, top, 2, 0x1f, 0xffffffff;
        max.f32 top, top, other;
        fma.rn.f32 top, top, ${8 + row}, {float_bits(-bits)};
        max.f32 ${row}, ${6 + row}, top;"""


def _repeat_asm(count: int) -> str:
    """`count` exponentials, made again if a shift of the warp was raised.

    Arguments are the exponentials, logits, factors, shifts, and whether one was raised.
    Values lie two of a row, two of the other, so shifts 0 and 2 stand for all.
    """
    values = range(count)
    exps, logits, factor, shift, was_raised = (count * i for i in range(1, 6))
    return "\n".join([
        "{ .reg .pred skip; .reg .f32 low, high;",
        f"setp.eq.s32 skip, ${was_raised}, 0;",
        *(f"mov.f32 ${i}, ${exps + i};" for i in values),
        "@skip bra.uni done;",
        f"neg.f32 low, ${shift}; neg.f32 high, ${shift + 2};",
        *(
            f"fma.rn.f32 ${i}, ${logits + i}, ${factor}, {'high' if i & 2 else 'low'};"
            f"ex2.approx.ftz.f32 ${i}, ${i};"
            for i in values
        ),
        "done: }",
    ])  # fmt: skip


_RAISE = gl.constexpr({bits: _raise_asm(bits) for bits in (6, 7, 8)})
_RAISE_OPERANDS = gl.constexpr("=f,=f,=r,=r," + ",".join("f" * 8))
_REPEAT = gl.constexpr({n: _repeat_asm(n) for n in (16, 32)})
_REPEAT_OPERANDS = gl.constexpr({n: operands(n, 4 * n) + ",r" * n for n in (16, 32)})


@gluon.jit
def _raised(shift, logits, factor, BITS: gl.constexpr):
    """The shifts, raised where `logits [64, n]` need it, and whether one of the warp was."""
    top = gl.convert_layout(thread_maxima(logits), shift.type.layout, assert_trivial=True)
    asm: gl.constexpr = _RAISE[BITS]
    values = [top, shift, factor, -shift]
    types: gl.constexpr = (gl.float32, gl.int32)
    return gl.inline_asm_elementwise(asm, _RAISE_OPERANDS, values, types, True, 2)


@gluon.jit
def _repeated(exps, logits, factor, shift, was_raised):
    """`exps`, in warps that raised a shift 2**(logits * factor - shift) instead."""
    n: gl.constexpr = logits.shape[1] // 2
    asm: gl.constexpr = _REPEAT[n]
    constraints: gl.constexpr = _REPEAT_OPERANDS[n]
    values = [exps, logits, factor, spread(shift, logits), spread(was_raised, logits)]
    return gl.inline_asm_elementwise(asm, constraints, values, gl.float32, True, n)


@gluon.jit
def _halves(logits):
    """The left and the right columns of `logits [64, n]`."""
    n: gl.constexpr = logits.shape[1] // 2
    layout: gl.constexpr = product_layout(n)
    left, right = gl.split(logits.reshape([ROWS, 2, n]).permute([0, 2, 1]))
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def lazy_softmax(logits, shift, total, factor, EVERY: gl.constexpr, BITS: gl.constexpr):
    """One block of an online softmax.

    The exponentials of half of the block hide the search for a weight that is too large, and only
    they have to be made again.

    Args:
        logits: `[64, n]`, to be multiplied by `factor`; an offset common to all calls cancels.
        shift: `[64, 4]`, one for all threads of a row, -inf at first.
        total: the sums of weights so far, as of `thread_sums`.
        factor: of the logits, log2(e) included, > 0.
        EVERY: as of `power_of_two`.
        BITS: log2 of the weight of a maximum to which a shift is raised.

    Returns:
        The new `shift` and `total`, what results so far are to be multiplied by, `[64, 4]`, and the
        weights.
    """
    layout: gl.constexpr = logits.type.layout
    left, right = _halves(logits)
    exps = power_of_two(left * factor - spread(shift, left), EVERY)
    raised, was_raised = _raised(shift, logits, factor, BITS)
    exps = _repeated(exps, left, factor, raised, was_raised)
    rest = power_of_two(right * factor - spread(raised, right), EVERY)
    weight = gl.join(exps, rest).permute([0, 2, 1]).reshape(logits.shape)
    weight = gl.convert_layout(weight, layout, assert_trivial=True)
    decay = gl.exp2(shift - raised)
    return raised, total * decay + thread_sums(weight), decay, weight


@gluon.jit
def softmax(logits, peak, total, factor, EVERY: gl.constexpr, BITS: gl.constexpr):
    """`lazy_softmax`, or, if `BITS` is 0, `online_softmax`."""
    if BITS == 0:
        peak, total, decay, weight = online_softmax(logits, peak, total, factor, EVERY)
    else:
        peak, total, decay, weight = lazy_softmax(logits, peak, total, factor, EVERY, BITS)
    return peak, total, decay, weight


@gluon.jit
def no_weights(n: gl.constexpr, BITS: gl.constexpr):
    """The `peak` or `shift`, and the `total`, before the first block of `n` keys."""
    layout: gl.constexpr = product_layout(n)
    total = thread_sums(gl.zeros([ROWS, n], gl.float32, layout))
    if BITS == 0:
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    else:
        peak = gl.full(total.shape, float("-inf"), gl.float32, total.type.layout)
    return peak, total
