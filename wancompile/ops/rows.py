"""Which rows of a tensor repeat the row before them."""

import torch
from torch import Tensor

from wancompile.ops.check import require
from wancompile.ops.chunk import row_chunks


@torch.library.custom_op("wancompile::repeated_rows", mutates_args=())
def repeated_rows(x: Tensor) -> Tensor:
    """For each row the first one of the run of equal rows that it is in.

    Whoever reads row `repeated_rows(x)[b, s]` instead of row s reads the same values, but from few
    places that stay in cache. A modulation with a row per token has one or two distinct rows.

    Args:
        x: `[B, S, ...]`, any dtype.

    Returns:
        `[B, S]` int32, at most s in column s. NaN equals nothing, so a row with NaN is a run alone.
    """
    check_rows(x)
    batch, count = x.shape[:2]
    fresh = torch.ones(batch, count, dtype=torch.bool, device=x.device)
    for rows in row_chunks(count - 1, batch * x[0, :1].numel(), x.device):
        later = slice(rows.start + 1, rows.stop + 1)
        fresh[:, later] = (x[:, later] != x[:, : count - 1][:, rows]).flatten(2).any(-1)
    place = torch.arange(count, dtype=torch.int32, device=x.device)
    return torch.where(fresh, place, 0).cummax(1).values


@repeated_rows.register_fake
def fake_repeated_rows(x: Tensor) -> Tensor:
    """Shape and dtype of `repeated_rows`."""
    check_rows(x)
    return x.new_empty(x.shape[:2], dtype=torch.int32)


def check_rows(x: Tensor) -> None:
    """Raise InputError unless the argument is that of `repeated_rows`."""
    require(x.dim() >= 3, "repeated_rows", "x [B, S, ...]", x)
