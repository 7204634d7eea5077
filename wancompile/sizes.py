"""Which dimensions of a call may change, and an example in which none of them looks fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from wancompile.signature import flatten

Dims = dict[str, set[int]]

# Without a hint from the samples, these dimensions are taken to change from call to call, by the
# rank of the tensor: [batch, channels, frames, height, width], [batch, tokens, channels], and
# timesteps [batch] or [batch, tokens].
_DYNAMIC_DIMS: Mapping[int, tuple[int, ...]] = {
    5: (0, 2, 3, 4),
    4: (0,),
    3: (0,),
    2: (0, 1),
    1: (0,),
}
_HEIGHT, _WIDTH = 3, 4


def tensors(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors among named arguments, nested ones under the names of `flatten`."""
    leaves = flatten(arguments)
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def video_of(found: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that has frames, height and width."""
    return next((name for name, tensor in found.items() if tensor.dim() == 5), None)


def dynamic_dims(arguments: Sequence[Mapping[str, Any]]) -> Dims:
    """Return, for every tensor of the calls, the dimensions that may change from call to call."""
    samples = [tensors(one) for one in arguments]
    dims = {}
    for name, tensor in samples[0].items():
        varying = {
            dim
            for dim in range(tensor.dim())
            if len({sample[name].shape[dim] for sample in samples}) > 1
        }
        dims[name] = _expected(name, samples[0]) | varying
    return dims


def _expected(name: str, sample: Mapping[str, torch.Tensor]) -> set[int]:
    tensor = sample[name]
    expected = set(_DYNAMIC_DIMS.get(tensor.dim(), ()))
    # A short tensor of another length than the batch holds settings, not one entry per video.
    batch = max(sample.values(), key=torch.Tensor.dim).shape[0]
    if tensor.dim() <= 2 and tensor.shape[:1] != (batch,):
        return set()
    # Pictures of another size than the video, such as faces, are cut to what the model wants.
    video = video_of(sample)
    if tensor.dim() == 5 and video and tensor.shape[_HEIGHT:] != sample[video].shape[_HEIGHT:]:
        expected -= {_HEIGHT, _WIDTH}
    return expected


def examples(arguments: Mapping[str, Any], dims: Dims) -> Iterator[tuple[dict[str, Any], Dims]]:
    """Yield examples to capture with, and what is open in each: the likeliest reading first.

    In a call with a batch of 1, a tensor of one number may be one entry per video or a setting of
    the whole model. If there are several, one of them is taken for a setting where reading them
    all as entries has failed.
    """
    yield _without_ones(arguments, dims), dims
    single = [
        name
        for name, tensor in tensors(arguments).items()
        if dims.get(name) and tensor.shape == (1,)
    ]
    if len(single) < 2:
        return
    for name in single:
        fewer = {**dims, name: set()}
        yield _without_ones(arguments, fewer), fewer


def _without_ones(arguments: Mapping[str, Any], dims: Dims) -> dict[str, Any]:
    """Double the dynamic dimensions of the example where one of them is 1.

    torch.export takes a size of 1 for a fact about the model, and so it does with a height or width
    of one patch. Doubling the same dimension of every tensor that has it keeps the sizes that
    belong together in step.
    """
    video = {name: t for name, t in tensors(arguments).items() if dims.get(name)}
    factors = dict.fromkeys(range(5), 1)
    for name, tensor in video.items():
        for dim in dims[name]:
            one = 2 if dim in (_HEIGHT, _WIDTH) else 1
            if tensor.shape[dim] <= one and (dim == 0 or tensor.dim() == 5):
                factors[dim] = 2
    tokens = factors[2] * factors[_HEIGHT] * factors[_WIDTH]

    def widen(name: str, leaf: Any) -> Any:
        if name not in video:
            return leaf
        repeats = [factors[0]] + [1] * (leaf.dim() - 1)
        if leaf.dim() == 5:
            repeats[2:] = [factors[dim] if dim in dims[name] else 1 for dim in range(2, 5)]
        elif leaf.dim() == 2:
            repeats[1] = tokens
        return leaf.repeat(repeats) if any(r > 1 for r in repeats) else leaf

    return map_leaves(arguments, widen)


def map_leaves(arguments: Mapping[str, Any], fn: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return named arguments with `fn(name, leaf)` in the place of every leaf."""
    return {
        name: pytree.tree_map_with_path(
            lambda path, leaf, name=name: fn(name + pytree.keystr(path), leaf), value
        )
        for name, value in arguments.items()
    }
