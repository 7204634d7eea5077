"""The rewrites, one file each, and the order in which they run."""

from __future__ import annotations

import torch

from wancompile.passes.canonicalize import Canonicalize
from wancompile.passes.choose_folds import ChooseFolds
from wancompile.passes.detect_attention import DetectAttention
from wancompile.passes.detect_mlp import DetectMlp
from wancompile.passes.drop_noops import DropNoops
from wancompile.passes.fold_constants import FoldConstants
from wancompile.passes.fuse_gelu import FuseGelu
from wancompile.passes.fuse_linear_gelu import FuseLinearGelu
from wancompile.passes.fuse_linear_residual import FuseLinearResidual
from wancompile.passes.fuse_norm import FuseNorm
from wancompile.passes.fuse_residual import FuseResidual
from wancompile.passes.fuse_rotary import FuseRotary
from wancompile.passes.lower import Lower
from wancompile.passes.merge_linears import MergeLinears
from wancompile.passes.name_sites import NameSites
from wancompile.passes.quantize_attention import QuantizeAttention
from wancompile.passes.quantize_linears import QuantizeLinears
from wancompile.passes.raise_attention import RaiseAttention
from wancompile.passes.raise_einsum import RaiseEinsum
from wancompile.passes.raise_gelu import RaiseGelu
from wancompile.passes.raise_linear import RaiseLinear
from wancompile.passes.raise_norms import RaiseNorms
from wancompile.passes.raise_slice_stores import RaiseSliceStores
from wancompile.passes.raise_stores import RaiseStores
from wancompile.passes.resolve_slices import ResolveSlices
from wancompile.passes.share_common import ShareCommon
from wancompile.passes.share_rows import ShareRows
from wancompile.passes.smooth import Smooth
from wancompile.passes.split_heads import SplitHeads
from wancompile.pipeline import Pass
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe

# EXPORTED -> NORMAL: one spelling for everything, then who feeds whom.
NORMALIZE: tuple[Pass, ...] = (
    RaiseSliceStores(),
    DropNoops(),
    Canonicalize(),
    RaiseStores(),
    RaiseEinsum(),
    RaiseLinear(),
    ResolveSlices(),
    ShareCommon(),
    RaiseNorms(),
    RaiseGelu(),
    RaiseAttention(),
    SplitHeads(),
    NameSites(),
    DetectAttention(),
    DetectMlp(),
    ChooseFolds(),
)


def smoothing(
    recipe: Recipe, stats: Stats | None, device: torch.device | None = None
) -> tuple[Pass, ...]:
    """NORMAL -> NORMAL: the float program with every scale folded; nothing without statistics."""
    return (Smooth(recipe, stats, device),) if stats is not None else ()


def quantization(
    recipe: Recipe, stats: Stats | None, device: torch.device | None = None
) -> tuple[Pass, ...]:
    """NORMAL -> QUANTIZED."""
    return (
        QuantizeAttention(recipe, stats),
        QuantizeLinears(recipe, stats, device),
        FoldConstants(),
    )


# QUANTIZED -> FUSED: what a kernel can do in one pass over memory becomes one op.
FUSE: tuple[Pass, ...] = (
    MergeLinears(),
    FuseGelu(),
    FuseLinearGelu(),
    FuseRotary(),
    FuseLinearResidual(),
    FuseNorm(),
    FuseResidual(),
    ShareRows(),
)


def fusion(*, share_rows: bool = True) -> tuple[Pass, ...]:
    """QUANTIZED -> FUSED; `ShareRows` changes no bit and can be left out."""
    return FUSE if share_rows else tuple(one for one in FUSE if not isinstance(one, ShareRows))


def lowering(device: torch.device) -> tuple[Pass, ...]:
    """FUSED -> LOWERED, for one device."""
    return (Lower(device),)
