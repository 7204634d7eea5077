"""The way out of `linear_hopper`: sums in registers become scaled floats, or 8 bits, in memory.

Each consumer has buffers of its own in shared memory, 64 rows of 128 bytes each (64 bytes for
results in 8 bits), and stores its sums through them by TMA, chunk by chunk of columns:

    all threads                         the thread that stores
                                        wait until the oldest store has read its buffer
    barrier  <----------------------->  barrier
    write a chunk into that buffer
    fence, so that TMA sees it
    barrier  <----------------------->  barrier
                                        start to store it

So with `BUFFERS` of them, that many stores are on their way while the next sums are scaled, and the
last ones still are while the next tile is multiplied. Whoever calls `store` waits for all stores
before the program ends. Rows and columns beyond an edge of the result are not stored.

A residual comes in through the same buffers, which then are as many as a tile has chunks. Each
consumer has a barrier `there`, of one arrival and the bytes of all its chunks, once a tile:

    all threads                         the thread that stores
    multiply the first steps            the same
                                        wait until all stores have read their buffers
                                        expect the bytes on `there`, start to load all chunks
    multiply the other steps            the same
    wait there, parity of the tile      the same
    for each chunk: read and add it, then write and store as above, without the wait

So stores have the time of the first steps to leave, and loads that of the others to arrive. A chunk
is read before it is written over: the barrier is between. No thread runs a tile ahead on `there`,
for all of a consumer meet after they have waited for it. What lies beyond an edge is loaded
as zeros and its bytes are counted, so each load is waited for, and none is left at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from wancompile.kernels.jit.activation import CUBIC, LINEAR, ONE_OVER_ROOT_2

# Both under both of their names, before and since Triton 3.7.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


# 1 / (1 + 2 ** x) to a few units of the last place, in a third of what Triton's quotient takes.
_LOGISTIC = gl.constexpr("""{
    .reg .f32 y;
    ex2.approx.ftz.f32 y, $1;
    add.f32 y, y, 0f3F800000;
    rcp.approx.ftz.f32 $0, y;
}""")


@gluon.jit
def values(source, start, end, COUNT: gl.constexpr, LAYOUT: gl.constexpr, STEP: gl.constexpr = 1):
    """`COUNT` values from `start` on, 0 from `end` on; with `STEP` 0 the first value again."""
    at = start + gl.arange(0, COUNT, LAYOUT)
    return gl.load(source + at * STEP, mask=at < end, other=0.0)


@gluon.jit
def column_factors(by, column, N: gl.constexpr, WIDTH: gl.constexpr, CHUNK: gl.constexpr):
    """Scales, biases and last factors of the columns of a chunk; `by` is `store`'s."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, CHUNK)
    scale = values(by[1], column, N, WIDTH, COLUMNS)
    # Triton's functions cannot return None, so the scales stand for what is not there.
    bias = scale if by[2] is None else values(by[2], column, N, WIDTH, COLUMNS)
    gate = scale if by[3] is None else values(by[3], column, N, WIDTH, COLUMNS)
    return scale, bias, gate


@gluon.jit
def fetch(residual, buffers, there, row, column, BLOCK_N: gl.constexpr):
    """Start to load the residual of a tile into `buffers`.

    Args:
        residual: descriptor, in blocks of a chunk's size.
        buffers: `store`'s, one for each chunk.
        there: the barrier that will take the bytes.
        row: first row of the tile in the residual.
        column: its first column.
        BLOCK_N: columns of the tile.
    """
    WIDTH: gl.constexpr = buffers.shape[2]
    CHUNKS: gl.constexpr = BLOCK_N // WIDTH
    gl.static_assert(buffers.shape[0] == CHUNKS, "with a residual each chunk has its own buffer")
    tma.store_wait(0)
    mbarrier.expect(there, CHUNKS * residual.block_type.nbytes)
    for i in gl.static_range(CHUNKS):
        tma_load(residual, [row, column + i * WIDTH], there, buffers.index(i))


@gluon.jit
def store(
    out,
    total,
    buffers,
    row_scale,
    factors,
    by,
    row,
    column,
    N: gl.constexpr,
    CHUNK: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GELU: gl.constexpr,
):
    """Scale, cast and store the sums of one consumer; as in `scaled_linear`, in that order.

    With a residual, as in `scaled_linear_residual`, and with GELU as in `linear_gelu_quantize`.

    Args:
        out: descriptor of the result, in blocks of a chunk's size.
        total: `[64, BLOCK_N]` int32 or fp32 sums.
        buffers: `[BUFFERS, 64, WIDTH]` of the result's type, in shared memory.
        row_scale: 64 fp32 scales of the rows.
        factors: `column_factors` of the first chunk.
        by: pointers to the scales of rows, of columns, to the biases, to what columns are
            multiplied by last (a gate, or 1/s behind GELU), and to the scale to round by; None for
            the latter three where there are none.
        row: first row of `total` in the result.
        column: its first column.
        N: columns of the result.
        CHUNK: layout of a chunk in registers.
        HAS_RESIDUAL: whether buffers hold what is to be added: `fetch` has filled them.
        GELU: "none" or "tanh", as in `linear_gelu_quantize`; None for no GELU.
    """
    BUFFERS: gl.constexpr = buffers.shape[0]
    WIDTH: gl.constexpr = buffers.shape[2]
    CHUNKS: gl.constexpr = total.shape[1] // WIDTH
    chunks = _split(total, CHUNKS)
    steps = 1.0 if by[4] is None else gl.div_rn(1.0, gl.load(by[4]))
    for i in gl.static_range(CHUNKS):
        value = gl.convert_layout(chunks[i], CHUNK, assert_trivial=True).to(gl.float32)
        value = _scaled(value, row_scale, factors, by, steps, GELU)
        if i + 1 < CHUNKS:  # load the next ones while this chunk waits for its buffer
            factors = column_factors(by, column + (i + 1) * WIDTH, N, WIDTH, CHUNK)
        buffer = buffers.index(i % BUFFERS)
        if HAS_RESIDUAL:
            value = buffer.load(CHUNK).to(gl.float32) + value
        else:
            tma.store_wait(BUFFERS - 1)
        buffer.store(_cast(value, out.dtype))
        fence_async_shared()
        _tma_store(out, [row, column + i * WIDTH], buffer)


@gluon.jit
def _scaled(value, row_scale, factors, by, steps, GELU: gl.constexpr):
    """A chunk with its scales, biases and last factors; no product is fused with a sum.

    `steps` is what all columns are multiplied by, one over the scale to round by.
    """
    scale, bias, last = factors
    value = value * row_scale[:, None] * scale[None, :]
    if by[2] is not None:
        value += bias.to(gl.float32)[None, :]
    if GELU is not None:
        value = _gelu(value, GELU == "tanh")
    if by[3] is not None:
        value *= (last * steps)[None, :]
    else:
        value *= steps
    return value


@gluon.jit
def _gelu(x, TANH: gl.constexpr):
    """As `activation.gelu`."""
    if TANH:
        power = x * gl.fma(x * x, CUBIC, LINEAR)
        y = x * gl.inline_asm_elementwise(_LOGISTIC, "=r,r", [power], gl.float32, True, 1)
    else:
        y = 0.5 * x * (1.0 + gl.erf(x * ONE_OVER_ROOT_2))
    return y


@gluon.jit
def _cast(value, dtype: gl.constexpr):
    """The values in the type of the result, rounded half to even; beyond 8 bits they saturate."""
    if dtype == gl.int8:
        value = gl.minimum(gl.maximum(value, -127.0), 127.0)
        value = (value + 12582912.0).to(gl.int32, bitcast=True)  # as `to_8bit` in rows
    return value.to(dtype)


@gluon.jit
def _split(sums, PARTS: gl.constexpr):
    """Cut along columns into `PARTS` pieces; no number leaves its register."""
    if PARTS == 1:
        return (sums,)
    else:  # noqa: RET505  (without it Triton compiles what follows the return, too)
        halves = sums.reshape([sums.shape[0], 2, sums.shape[1] // 2]).permute([0, 2, 1])
        left, right = halves.split()
        return _split(left, PARTS // 2) + _split(right, PARTS // 2)
