"""Rounding a weight column by column, each making up for the errors of those before it.

Frantar et al. 2022 ("GPTQ") round one input channel after the other and move the error to those
still to come, so that the product with typical inputs changes least. In the form of Chee et al.
2023 ("QuIP", theorem 6, which shows both to be one): with the Gram matrix of the inputs factored as
`H = M D M^T`, M upper triangular with ones on its diagonal, the error `E = W - Q` costs

    trace(E H E^T) = sum_j D_j |E_j + sum_{k < j} E_k M_kj|^2

so column j is rounded to the number nearest to `W_j + sum_{k < j} E_k M_kj`.

H is never made: of T tokens it is `A A^T + d I`, where A `[K, T]` has a row for each channel, and M
is as thin as A. Eliminating from the last channel to the first, with `P = I` at first,

    D_j = d + a_j P a_j^T    M_kj = a_k q_j    q_j = P a_j^T / D_j    P <- P - D_j q_j q_j^T

so what a column has to make up for is `(sum_{k < j} E_k a_k) q_j`: a state of T numbers for each
row of the weight, whatever its width. The MLP of a large model has 13,824 channels and some hundred
tokens; its H alone would take more memory than the weight.

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
# Share of the mean of the Gram matrix's diagonal that is added to it: what fewer tokens than
# channels say is not to be believed to the last digit.
_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors move from column to column, made once for all weights that read the same inputs.

    `order [K]` int64 is the sequence in which columns are rounded, the loudest first, and that of
    the rows of `inputs [K, T]` and `gains [K, T]` fp32, which are a and q above. `spreads` are the
    M of each block of columns, fp32; what is not above their diagonals is of no use.
    """

    order: Tensor
    inputs: Tensor
    gains: Tensor
    spreads: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor) -> Feedback:
        """Learn from inputs `x [T, K]` fp32, as the product sees them: smoothed, in 8 bits.

        Where x is zero, not finite, or too large for its square to be finite, nothing is learned,
        and weights are rounded to nearest.
        """
        loudness = x.square().mean(0)
        order = loudness.argsort(descending=True, stable=True)
        damping = _DAMPING * loudness.mean().double()
        if not bool(torch.isfinite(damping) & (damping > 0)):
            x, damping = torch.zeros_like(x), torch.ones_like(damping)
        inputs = x.double().T[order] / len(x) ** 0.5
        gains, spreads = torch.empty_like(inputs), []
        left = torch.eye(len(x), dtype=torch.float64, device=x.device)
        for block in reversed(_blocks(len(inputs))):
            rows = inputs[block]
            gains[block], spread, left = _eliminated(rows, left, damping)
            spreads.append(spread.float())
        return cls(order, inputs.float(), gains.float(), tuple(reversed(spreads)))


def _eliminated(rows: Tensor, left: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eliminate the channels of a block, of which `rows [C, T]` are a.

    Returns:
        Their q `[C, T]`, their M `[C, C]`, and what becomes of P `[T, T]`, which is `left`.
    """
    seen = rows @ left
    gram = seen @ rows.T
    gram.diagonal().add_(damping)
    # Cholesky from the last channel to the first, which makes the factor upper triangular.
    factor = torch.linalg.cholesky_ex(gram.flip(0, 1)).L.flip(0, 1)
    root = factor.diagonal()
    gains = torch.linalg.solve_triangular(factor, seen, upper=True)
    return gains / root[:, None], factor / root, left - gains.T @ gains


def _blocks(channels: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, channels)) for start in range(0, channels, _BLOCK)]


def round_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype, feedback: Feedback) -> QTensor:
    """Quantize `weight [N, K]` fp32 with `scale [N, 1]` fp32 for inputs that `feedback` knows.

    Holds two more of the result, and `[N, T]` fp32. Where inputs are uncorrelated, the result is
    that of rounding to nearest, bit for bit.
    """
    scales, columns = scale.flatten(), weight.new_empty((weight.shape[1], len(weight)), dtype=dtype)
    state = weight.new_zeros(len(weight), feedback.inputs.shape[1])
    for block, spread in zip(_blocks(len(columns)), feedback.spreads, strict=True):
        exact = weight.T[feedback.order[block]].contiguous()
        errors = torch.empty_like(exact)
        moved = feedback.gains[block] @ state.T
        round_columns(exact, moved, scales, spread, columns[block], errors)
        state.addmm_(errors.T, feedback.inputs[block])
    return QTensor(columns[feedback.order.argsort()].T.contiguous(), scale)


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
