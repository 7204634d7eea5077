from __future__ import annotations

import pytest

pytest.importorskip("triton")

from triton import knobs

from wancompile.kernels.jit.wide_int8 import WIDE_INT8_ENTRY, as_int8, wide_int8

PTX = """.visible .entry {name}(
\twgmma.mma_async.sync.aligned.m64n256k32.f32.{dtype}.{dtype} {{%r1,%r2}}, %rd1, %rd2, %p1, 1, 1;
\twgmma.mma_async.sync.aligned.m64n256k32.f32.{dtype}.{dtype} {{%r1,%r2}}, %rd3, %rd4, %p1, 1, 1;
\tmul.rn.f32 \t%r3, %r1, %r2;
"""
FP8 = PTX.format(name=WIDE_INT8_ENTRY, dtype="e4m3")


def compiled(ptx: str) -> str:
    """What comes out of a pipeline whose last stage gave `ptx`."""
    stages = {"ptx": lambda source, metadata: ptx}
    if knobs.runtime.add_stages_inspection_hook is not None:
        knobs.runtime.add_stages_inspection_hook(None, stages, None, None, 90)
    return stages["ptx"]("", {})


def test_products_become_int8_and_the_rest_stays():
    lines = as_int8(FP8).splitlines()
    assert lines[1].strip() == (
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {%r1,%r2}, %rd1, %rd2, %p1;"
    )
    assert lines[2].strip() == (
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {%r1,%r2}, %rd3, %rd4, %p1;"
    )
    assert lines[::3] == FP8.splitlines()[::3]


@pytest.mark.parametrize(
    "ptx",
    [
        PTX.format(name=WIDE_INT8_ENTRY, dtype="e5m2"),
        FP8.replace("%rd3, %rd4, %p1, 1, 1", "%rd3, %rd4, %p1, 1, -1"),
    ],
    ids=["no product", "a product with a factor"],
)
def test_products_written_otherwise_are_refused(ptx):
    with pytest.raises(RuntimeError, match="could be made int8"):
        as_int8(ptx)


def test_only_the_kernel_of_that_name_is_renamed_and_only_within():
    other = PTX.format(name="linear_hopper", dtype="e4m3")
    assert compiled(FP8) == FP8
    with wide_int8():
        assert compiled(FP8) == as_int8(FP8)
        assert compiled(other) == other
    assert knobs.runtime.add_stages_inspection_hook is None
