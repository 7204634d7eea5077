"""A ring of buffers in shared memory, between a warp that loads and groups of warps that compute.

Warps meet at mbarriers. Round r of a barrier is its r-th use: who waits for it asks for parity
r % 2, and of a fresh barrier parity 1 counts as passed.

Block n lies in buffer n % stages, in round n // stages. A round of `full` takes the one arrival of
the loader, and the bytes that it announces; the groups wait for it. A round of `free` takes an
arrival of each group. Before it fills a buffer in round r, the loader waits for round r - 1 of
`free`, at once if r is 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """`COUNT` barriers whose rounds take `ARRIVALS` arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), ARRIVALS)
    return barriers


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Buffers for blocks of `desc`, and their barriers `full` and `free`."""
    N: gl.constexpr = desc.block_shape[0]
    M: gl.constexpr = desc.block_shape[1]
    buffers = gl.allocate_shared_memory(desc.dtype, [STAGES, N, M], desc.layout)
    return buffers, make_barriers(STAGES, 1), make_barriers(STAGES, GROUPS)


@gluon.jit
def buffer(ring, block):
    """The buffer of `block`."""
    buffers = ring[0]
    STAGES: gl.constexpr = buffers.shape[0]
    return buffers.index(block % STAGES)


@gluon.jit
def fill(ring, desc, block, row, column):
    """Load `block`, which lies at `row` and `column` of `desc`, when its buffer is free."""
    full, free = ring[1], ring[2]
    STAGES: gl.constexpr = full.shape[0]
    stage = block % STAGES
    mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    at = [row, column]
    tma.async_copy_global_to_shared(desc, at, full.index(stage), ring[0].index(stage))


@gluon.jit
def wait(ring, block):
    """Wait until `block` is there."""
    full = ring[1]
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(block % STAGES), block // STAGES & 1)


@gluon.jit
def release(ring, block, pred=True):
    """Say, for one group, that `block` is done with; if `pred`."""
    free = ring[2]
    STAGES: gl.constexpr = free.shape[0]
    mbarrier.arrive(free.index((block + STAGES) % STAGES), pred=pred)
