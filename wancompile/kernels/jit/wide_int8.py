"""int8 products of 256 columns, which PTX has and Triton's compiler refuses to write.

Hopper's `wgmma` multiplies 64 rows of int8 by up to 256 columns at once, as it does e4m3. The list
of shapes in Triton's compiler ends at 224 for int8, and its tiles are powers of two: so 128. But
the two instructions differ in their name and in two factors that only floats have, and take the
same operands: 8-bit numbers, laid out alike in shared memory, and sums of 32 bits in registers.

So a kernel is written for e4m3 and fp32, reads its operands and sums as what they really are, and
has its instructions renamed between Triton's last stage, PTX, and the assembler. The hook for that
is Triton's own (`knobs.runtime.add_stages_inspection_hook`). It renames in kernels named
`WIDE_INT8_ENTRY` only: what another thread compiles meanwhile stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

WIDE_INT8_ENTRY = "linear_wide_int8"
"""The name in PTX of a kernel whose e4m3 products are meant as int8."""

_ENTRY = re.compile(rf"\.entry {WIDE_INT8_ENTRY}\b")
_PRODUCT = re.compile(
    r"(wgmma\.mma_async\.sync\.aligned\.m64n\d+k32)\.f32\.e4m3\.e4m3( \{[^}]*\}, [^;]*), 1, 1;"
)


@contextmanager
def wide_int8() -> Iterator[None]:
    """Within it, kernels named `WIDE_INT8_ENTRY` are compiled to multiply int8."""
    outside = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = outside


def as_int8(ptx: str) -> str:
    """The text of a kernel, its e4m3 products with fp32 sums made int8 products with int32 sums.

    Raises:
        RuntimeError: there is none, or one is not written as expected.
    """
    renamed, count = _PRODUCT.subn(r"\1.s32.s8.s8\2;", ptx)
    if not count or "e4m3" in renamed:
        raise RuntimeError(f"of the e4m3 products of a kernel, only {count} could be made int8")
    return renamed


def _hook(
    backend: object = None,
    stages: dict[str, Callable[[Any, Any], Any]] | None = None,
    options: object = None,
    language: object = None,
    capability: int | None = None,
) -> tuple[str, str] | None:
    """Put the renaming after the stage `ptx`.

    Later Tritons also call it without arguments, for the key and the hash of what it does.
    """
    if stages is None:
        return WIDE_INT8_ENTRY, WIDE_INT8_ENTRY
    compile_ptx = stages["ptx"]

    def rename(source: Any, metadata: Any) -> Any:
        ptx = compile_ptx(source, metadata)
        return as_int8(ptx) if _ENTRY.search(ptx) else ptx

    stages["ptx"] = rename
    return None
