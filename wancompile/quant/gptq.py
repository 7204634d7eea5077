"""Rounding a weight column by column, each making up for the errors of those before it.

Frantar et al. 2022 ("GPTQ") round one input channel after the other and move the error to those
still to come, so that the product with typical inputs changes least. In the form of Chee et al.
2023 ("QuIP", theorem 6, which shows both to be one): with the Gram matrix of the inputs factored as
`H = M D M^T`, M upper triangular with ones on its diagonal, the error `E = W - Q` costs

    trace(E H E^T) = sum_j D_j |E_j + sum_{k < j} E_k M_kj|^2

so column j is rounded to the number nearest to `W_j + sum_{k < j} E_k M_kj`. M comes from one
Cholesky decomposition, and nothing is inverted.

Moving the target besides, to make up for the rounding of the inputs (Li et al. 2025, "GPTAQ"), was
tried: from few tokens it learns by heart, and from many the trained models' outputs were no nearer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.kernels.triton_quantize import lacks_type
from wancompile.quant.numerics import QTensor, decode, quantize

# Columns whose errors are spread one by one; those behind them wait for a product. As many errors
# fit into the registers of a thread.
_BLOCK = 64
# Shares of the mean of the Gram matrix's diagonal that are added to it, until it has a factor.
_DAMPING = (0.01, 0.1, 1.0)


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors move from column to column, made once for all weights that read the same inputs.

    `order [K]` int64: the sequence in which columns are rounded, the loudest first; `spread [K, K]`
    fp32: M above without its diagonal, for columns in that order.
    """

    order: Tensor
    spread: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Feedback:
        """Learn from inputs `x [T, K]` fp32, as the product sees them: smoothed, in 8 bits.

        With fewer tokens than channels the Gram matrix has no factor, and what few tokens say is
        not to be believed to the last digit: its diagonal is raised. Where x is zero or not finite
        nothing is learned, and weights are rounded to nearest. Holds up to two more `[K, K]`.
        """
        loudness = x.square().mean(0)
        order = loudness.argsort(descending=True, stable=True)
        # Cholesky from the last column to the first, which makes the factor upper triangular.
        last_first = x[:, order.flip(0)]
        gram = last_first.T @ last_first / len(x)
        for damping in _DAMPING:
            ridge = damping * loudness.mean()
            gram.diagonal().add_(ridge)
            lower, failed = torch.linalg.cholesky_ex(gram)
            if bool(ridge > 0) and not bool(failed):
                break
        else:
            return cls(order, torch.zeros_like(gram))
        del gram
        factor = lower.flip(0, 1)
        return cls(order, factor.div_(factor.diagonal().clone()).triu_(1))


def round_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype, feedback: Feedback) -> QTensor:
    """Quantize `weight [N, K]` fp32 with `scale [N, 1]` fp32 for inputs that `feedback` knows.

    Holds two more tensors of the size of the weight. Where inputs are uncorrelated, the result is
    that of rounding to nearest, bit for bit.
    """
    columns, scales = weight.T[feedback.order].contiguous(), scale.flatten()
    errors, data = torch.empty_like(columns), torch.empty_like(columns, dtype=dtype)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(columns)))
        moved = feedback.spread[:start, block].T @ errors[:start]
        spread = feedback.spread[block, block]
        round_columns(columns[block], moved, scales, spread, data[block], errors[block])
    return QTensor(data[feedback.order.argsort()].T.contiguous(), scale)


def round_columns(
    columns: Tensor, moved: Tensor, scale: Tensor, spread: Tensor, data: Tensor, errors: Tensor
) -> None:
    """Round a block of columns, each making up for those before it in the block.

    Args:
        columns: `[C, N]` fp32, in the order in which they are rounded.
        moved: `[C, N]` fp32, what the blocks before add to the targets; overwritten.
        scale: `[N]` fp32.
        spread: `[C, C]` fp32, what is above its diagonal of that of `Feedback`.
        data: `[C, N]`, int8 or e4m3: what they are rounded to, written here.
        errors: `[C, N]` fp32, `columns - data * scale`, written here.
    """
    if lacks_type(columns.device, data.dtype) is None:
        from wancompile.kernels.jit import round_columns as kernel

        kernel.round_columns(columns, moved, scale, spread, data, errors)
        return
    for j, column in enumerate(columns):
        data[j] = quantize(column + moved[j], scale, data.dtype)
        errors[j] = column - decode(data[j]) * scale
        moved[j + 1 :].addr_(spread[j, j + 1 :], errors[j])
