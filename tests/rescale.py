"""Give a Wan model outlier channels without changing the function that it computes.

Large text-to-video models have activations whose channels differ by orders of magnitude; small
ones trained for a demonstration do not. Multiplying what a norm or a linear yields by one factor
per channel, and dividing the columns of the linears that read it, makes outliers of any size, and
in exact arithmetic the output stays the same bit for bit.

    inject_outliers(model)                         # in place, sigma 1.5
    inject_outliers(copy.deepcopy(model), sigma=2)

This is a helper of tests and benchmarks. It knows the module names of diffusers on purpose, which
the compiler must not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Positions in the six vectors that modulate a block: (shift, scale) for the norm of each branch.
_ATTENTION = (0, 1)
_FEED_FORWARD = (3, 4)


@torch.no_grad()
def inject_outliers(model: nn.Module, sigma: float = 1.5, seed: int = 0) -> nn.Module:
    """Rescale channels of `model` in place by log-normal factors; return it.

    Args:
        model: a diffusers `WanTransformer3DModel` (VACE's side blocks are rescaled too) whose
            projections are not fused.
        sigma: standard deviation of the logarithm of the factors; 0 changes nothing.
        seed: draws the factors.

    The inputs of every linear of every block get outliers, but for `ffn.net.2`: no factor passes
    the GELU before it. Where `norm2` is an identity, `attn2.to_q` reads the stream and keeps it.

    Raises:
        ValueError: the projections are fused.
    """
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError("rescale first, fuse the projections afterwards")
    draw = _Factors(sigma, seed)
    blocks = [*model.blocks, *getattr(model, "vace_blocks", ())]
    _rescale_modulation(model, blocks, draw)
    _rescale_encoder_states(model, blocks, draw)
    for block in blocks:
        _rescale_block(block, draw)
    return model


class _Factors:
    """Draws log-normal factors."""

    def __init__(self, sigma: float, seed: int) -> None:
        self._sigma = sigma
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, like: Tensor) -> Tensor:
        """Return a factor for each row of `like`, on its device."""
        noise = torch.randn(like.shape[0], generator=self._generator, dtype=torch.float64)
        return (self._sigma * noise).exp().to(like.device)


def _rescale_modulation(model: nn.Module, blocks: Iterable[nn.Module], draw: _Factors) -> None:
    """Scale the modulated norms of all blocks.

    `norm * (1 + scale) + shift` times f is `norm * (1 + scale') + shift'` with `shift' = f * shift`
    and `scale' = f * scale + (f - 1)`. Both vectors are a block's table plus the time projection;
    all blocks share the projection, so they share f as well.
    """
    projection = model.condition_embedder.time_proj
    for positions, readers in ((_ATTENTION, _self_attention), (_FEED_FORWARD, _feed_forward)):
        width = projection.out_features // 6
        factor = draw(projection.weight[:width])
        for position in positions:
            rows = slice(position * width, (position + 1) * width)
            _multiply(projection.weight[rows], factor[:, None])
            _multiply(projection.bias[rows], factor)
        shift, scale = positions
        for block in blocks:
            table = block.scale_shift_table[0]
            _multiply(table[shift], factor)
            table[scale].copy_(factor * (1 + table[scale].double()) - 1)
            _divide_columns(readers(block), factor)


def _self_attention(block: nn.Module) -> list[nn.Module]:
    return [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]


def _feed_forward(block: nn.Module) -> list[nn.Module]:
    return [block.ffn.net[0].proj]


def _rescale_encoder_states(model: nn.Module, blocks: list[nn.Module], draw: _Factors) -> None:
    """Scale the text and image states that the blocks share."""
    embedder = model.condition_embedder
    text = _multiply_rows([embedder.text_embedder.linear_2], draw)
    _divide_columns([linear for b in blocks for linear in (b.attn2.to_k, b.attn2.to_v)], text)
    if embedder.image_embedder is None:
        return
    image = _multiply_rows([embedder.image_embedder.norm2], draw)
    added = [linear for b in blocks for linear in (b.attn2.add_k_proj, b.attn2.add_v_proj)]
    _divide_columns(added, image)


def _rescale_block(block: nn.Module, draw: _Factors) -> None:
    """Scale what stays inside a block: the affine norm, and the values of both attentions."""
    if not isinstance(block.norm2, nn.Identity):
        _divide_columns([block.attn2.to_q], _multiply_rows([block.norm2], draw))
    for attention in (block.attn1, block.attn2):
        values = [attention.to_v]
        if attention.add_v_proj is not None:
            values.append(attention.add_v_proj)
        _divide_columns([attention.to_out[0]], _multiply_rows(values, draw))


def _multiply_rows(producers: list[nn.Module], draw: _Factors) -> Tensor:
    """Multiply the outputs of linears or norms by one factor per channel, and return it."""
    factor = draw(producers[0].weight)
    for module in producers:
        _multiply(module.weight, factor.reshape(-1, *[1] * (module.weight.dim() - 1)))
        _multiply(module.bias, factor)
    return factor


def _divide_columns(linears: Iterable[nn.Module], factor: Tensor) -> None:
    for linear in linears:
        _multiply(linear.weight, 1 / factor)


def _multiply(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place, rounding once."""
    tensor.copy_(tensor.double() * factor)
