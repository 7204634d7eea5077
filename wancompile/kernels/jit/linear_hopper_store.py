"""The way out of `linear_hopper`: sums in registers become scaled floats in memory.

Each consumer has buffers of its own in shared memory, 64 rows of 128 bytes each, and stores its
sums through them by TMA, chunk by chunk of columns:

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
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

_tma_store = (  # under both of its names, before and since Triton 3.7
    tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
)


@gluon.jit
def values(source, start, end, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """`COUNT` values from `start` on, 0 from `end` on."""
    at = start + gl.arange(0, COUNT, LAYOUT)
    return gl.load(source + at, mask=at < end, other=0.0)


@gluon.jit
def column_factors(by, column, N: gl.constexpr, WIDTH: gl.constexpr, CHUNK: gl.constexpr):
    """Scales and biases of the columns of a chunk; `by` is `store`'s."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, CHUNK)
    return values(by[1], column, N, WIDTH, COLUMNS), values(by[2], column, N, WIDTH, COLUMNS)


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
    HAS_BIAS: gl.constexpr,
):
    """Scale, cast and store the sums of one consumer; as in `scaled_linear`, in that order.

    Args:
        out: descriptor of the result, in blocks of a chunk's size.
        total: `[64, BLOCK_N]` int32 or fp32 sums.
        buffers: `[BUFFERS, 64, WIDTH]` of the result's type, in shared memory.
        row_scale: 64 fp32 scales of the rows.
        factors: `column_factors` of the first chunk.
        by: pointers to the scales of rows, of columns, and to the biases.
        row: first row of `total` in the result.
        column: its first column.
        N: columns of the result.
        CHUNK: layout of a chunk in registers.
        HAS_BIAS: whether there is a bias; else a pointer to any N numbers stands for it.
    """
    BUFFERS: gl.constexpr = buffers.shape[0]
    WIDTH: gl.constexpr = buffers.shape[2]
    CHUNKS: gl.constexpr = total.shape[1] // WIDTH
    chunks = _split(total, CHUNKS)
    scale, bias = factors
    for i in gl.static_range(CHUNKS):
        value = gl.convert_layout(chunks[i], CHUNK, assert_trivial=True).to(gl.float32)
        value = value * row_scale[:, None] * scale[None, :]
        if HAS_BIAS:
            value += bias.to(gl.float32)[None, :]
        if i + 1 < CHUNKS:  # load the next ones while this chunk waits for its buffer
            scale, bias = column_factors(by, column + (i + 1) * WIDTH, N, WIDTH, CHUNK)
        buffer = buffers.index(i % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        buffer.store(value.to(out.dtype))
        fence_async_shared()
        _tma_store(out, [row, column + i * WIDTH], buffer)


@gluon.jit
def _split(sums, PARTS: gl.constexpr):
    """Cut along columns into `PARTS` pieces; no number leaves its register."""
    if PARTS == 1:
        return (sums,)
    else:  # noqa: RET505  (without it Triton compiles what follows the return, too)
        halves = sums.reshape([sums.shape[0], 2, sums.shape[1] // 2]).permute([0, 2, 1])
        left, right = halves.split()
        return _split(left, PARTS // 2) + _split(right, PARTS // 2)
