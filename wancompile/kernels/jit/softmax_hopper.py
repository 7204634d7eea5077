"""The parts of flash attention between its two products, on the registers of four warps.

A product `[64, n]` lies so that a thread holds rows r and r + 8 and of every 8 columns two
neighbours. Nothing here moves data between threads but the row maximum.
"""

from __future__ import annotations

import math
import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from wancompile.ops.attention import P_RANGE

ROWS = gl.constexpr(64)
_P_BITS = gl.constexpr(math.log2(P_RANGE))

MAGIC = 1.5 * 2**23
"""A float whose lowest bits are those of an integer of less than 23 bits that is added to it."""
MAGIC_BITS = gl.constexpr(0x4B400000)
"""The bits of `MAGIC`. An int32 sum that starts from them ends as the bits of `MAGIC` + sum."""

_CUBIC = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)
"""2**r for |r| <= 1/2 with the least relative error (Remez), 7.5e-5; e4m3 rounds by up to 6e-2."""


def _hex(value: float) -> str:
    return f"0f{struct.unpack('I', struct.pack('f', value))[0]:08X}"


def _polynomial_asm(to: str, x: str) -> str:
    """2**x = 2**n * 2**r, n rounded by adding `MAGIC`, then added to the exponent of 2**r."""
    c = [_hex(value) for value in _CUBIC]
    return f"""{{ .reg .f32 x, n, r, y; .reg .b32 bits, power;
        max.f32 x, {x}, {_hex(-126.0)};
        add.rn.f32 n, x, {_hex(MAGIC)};
        sub.rn.f32 r, n, {_hex(MAGIC)};
        sub.rn.f32 r, x, r;
        fma.rn.f32 y, r, {c[3]}, {c[2]};
        fma.rn.f32 y, y, r, {c[1]};
        fma.rn.f32 y, y, r, {c[0]};
        mov.b32 power, n; shl.b32 power, power, 23;
        mov.b32 bits, y; add.s32 bits, bits, power;
        mov.b32 {to}, bits; }}"""


def _exp2_asm(every: int) -> str:
    rest = [f"ex2.approx.ftz.f32 ${i}, ${every + i};" for i in range(1, every)]
    return "\n".join([_polynomial_asm("$0", f"${every}"), *rest])


def _rescale_asm(count: int) -> str:
    """`count` values of a thread times as many factors, which differ between its two rows only.

    Values lie two of a row, two of the other, so factors 0 and 2 stand for all. The jump is
    uniform, for products that are issued later need all threads of a warp.
    """
    values = range(count)
    return "\n".join([
        "{ .reg .pred same, skip;",
        f"setp.eq.f32 same, ${2 * count}, {_hex(1.0)};",
        f"setp.eq.and.f32 same, ${2 * count + 2}, {_hex(1.0)}, same;",
        "vote.sync.all.pred skip, same, 0xffffffff;",
        *(f"mov.f32 ${i}, ${count + i};" for i in values),
        "@skip bra.uni done;",
        *(f"mul.rn.f32 ${i}, ${i}, ${2 * count + i};" for i in values),
        "done: }",
    ])  # fmt: skip


def _operands(results: int, arguments: int) -> str:
    return ",".join(["=f"] * results + ["f"] * arguments)


_EXP2 = gl.constexpr({n: _exp2_asm(n) for n in (2, 4, 8)})
_EXP2_OPERANDS = gl.constexpr({n: _operands(n, n) for n in (2, 4, 8)})
_RESCALE = gl.constexpr({d: _rescale_asm(d // 2) for d in (64, 128)})
_RESCALE_OPERANDS = gl.constexpr({d: _operands(d // 2, d) for d in (64, 128)})
_ROUND_TO_E4M3 = gl.constexpr("""{ .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high}; }""")
_ROUND_TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@gluon.jit
def _exp2(x, EVERY: gl.constexpr):
    """2**x, of every `EVERY` values one by polynomial; by none if `EVERY` is 0."""
    if EVERY == 0:
        result = gl.exp2(x)
    else:
        asm: gl.constexpr = _EXP2[EVERY]
        operands: gl.constexpr = _EXP2_OPERANDS[EVERY]
        result = gl.inline_asm_elementwise(asm, operands, [x], gl.float32, True, EVERY)
    return result


@gluon.jit
def rescale(result, decay):
    """`result [64, D]` times `decay [64]`; warps whose factors are all 1 jump."""
    layout: gl.constexpr = result.type.layout
    D: gl.constexpr = result.shape[1]
    decay = gl.convert_layout(decay, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
    asm: gl.constexpr = _RESCALE[D]
    operands: gl.constexpr = _RESCALE_OPERANDS[D]
    values = [result, decay]
    return gl.inline_asm_elementwise(asm, operands, values, gl.float32, True, D // 2)


@gluon.jit
def rounded(weight, TO: gl.constexpr):
    """`weight [64, n]` in `TO`, e4m3 or bf16, the neighbours of a thread packed into int32 words.

    Loops carry the words, for smaller values would take a register each.
    """
    return _rounded_to_bf16(weight) if gl.bfloat16 == TO else _rounded_to_e4m3(weight)


@gluon.jit
def _rounded_to_bf16(weight):
    """int32 `[64, n / 2]`: the two neighbours that a thread holds of 8 columns are a word."""
    n: gl.constexpr = weight.shape[1]
    even, odd = gl.split(weight.reshape([ROWS, n // 2, 2]))
    asm: gl.constexpr = _ROUND_TO_BF16
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def _rounded_to_e4m3(weight):
    """int32 `[64, n / 4]`.

    Of 16 columns of a product, a thread holds four, 0 1 8 9, 2 3 10 11 and so on; of an 8-bit
    operand it has to hold four neighbours. Columns are renamed so that they are neighbours, and
    rows of v are ordered alike.
    """
    n: gl.constexpr = weight.shape[1]
    columns = weight.reshape([ROWS, n // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    even, odd = gl.split(columns)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    four = [first, second, third, fourth]
    asm: gl.constexpr = _ROUND_TO_E4M3
    words = gl.inline_asm_elementwise(asm, "=r,f,f,f,f", four, gl.int32, True, 1)
    return words.reshape([ROWS, n // 4])


@gluon.jit
def operand(words, PRODUCT: gl.constexpr, TO: gl.constexpr):
    """What `rounded` made `words` of, as left operand of a product with layout `PRODUCT`."""
    two = gl.join(words, words)
    move: gl.constexpr = "mov.b32 $0, $1;"
    if gl.bfloat16 == TO:
        wide = two.reshape([ROWS, words.shape[1] * 2])
        weight = gl.inline_asm_elementwise(move, "=r,r,r", [wide], gl.bfloat16, True, 2)
    else:
        wide = gl.join(two, two).reshape([ROWS, words.shape[1] * 4])
        weight = gl.inline_asm_elementwise(move, "=r,r,r,r,r", [wide], gl.float8e4nv, True, 4)
    layout: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 32 // TO.primitive_bitwidth)
    return gl.convert_layout(weight, layout, assert_trivial=True)


@gluon.jit
def thread_sums(weight):
    """The sums `[64, 4]` of what each of the four threads of a row holds of `weight [64, n]`."""
    n: gl.constexpr = weight.shape[1]
    return gl.sum(gl.sum(weight.reshape([ROWS, n // 8, 4, 2]), 3), 1)


@gluon.jit
def mask(logits, first, k_tokens):
    """-inf in place of logits whose key, counted from `first`, is `k_tokens` or more."""
    layout: gl.constexpr = logits.type.layout
    key = first + gl.arange(0, logits.shape[1], gl.SliceLayout(0, layout))
    return gl.where((key < k_tokens)[None, :], logits, float("-inf"))


@gluon.jit
def online_softmax(logits, peak, total, factor, EVERY: gl.constexpr):
    """One block of an online softmax.

    Args:
        logits: `[64, n]`, to be multiplied by `factor`; an offset common to a row in all calls
            cancels.
        peak: `[64]`, the row maximum so far, -inf at first.
        total: the sums of weights so far, as of `thread_sums`.
        factor: `[64]`, of the logits of each row, log2(e) included, > 0.
        EVERY: as of `_exp2`.

    Returns:
        The new `peak` and `total`, what results so far are to be multiplied by, and the weights,
        times `P_RANGE`.
    """
    higher = gl.maximum(peak, gl.max(logits, 1))
    decay = gl.exp2((peak - higher) * factor)
    shift = higher * factor - _P_BITS
    weight = _exp2(logits * factor[:, None] - shift[:, None], EVERY)
    rows: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    old = total * gl.convert_layout(decay, rows, assert_trivial=True)[:, None]
    return higher, old + thread_sums(weight), decay, weight
