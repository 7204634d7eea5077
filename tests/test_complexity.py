"""The work of the passes grows in step with the blocks of a model; counted in calls, not time."""

from __future__ import annotations

import cProfile
import pstats

import torch
import torch.nn.functional as F
import zoo
from small import WEIGHTS, attend, fused, normal, plain, quantized

from wancompile import pipeline
from wancompile.export import export
from wancompile.ir.site import Fold, Site
from wancompile.passes import NORMALIZE, FoldConstants, Lower


def calls_of_passes(variant: str, layers: int) -> int:
    """Return how many Python calls all passes together make on a model of so many blocks."""
    model, kwargs = zoo.make(variant, layers)
    start = export(model, [kwargs], dynamic=False)
    profile = cProfile.Profile()
    profile.enable()
    program = quantized(pipeline.run(start, NORMALIZE), plain("int8"))
    program = fused(pipeline.run(program, [FoldConstants()]))
    pipeline.run(program, [Lower(torch.device("cpu"))])
    profile.disable()
    return pstats.Stats(profile).total_calls


def test_work_grows_linearly_in_blocks():
    calls_of_passes("i2v", 1)  # what is cached at the first use is not counted
    few, some, many = (calls_of_passes("i2v", layers) for layers in (2, 4, 8))
    assert many - some < 2.1 * (some - few)


def test_sums_that_branch_again_and_again_are_given_up():
    """Twelve doublings have 4096 paths back to the values."""

    def doubled(x, weight, bias):
        for _ in range(12):
            x = x + x
        return F.linear(x, weight, bias)

    def fn(self, x):
        def linear(x, weight, bias):
            return (doubled if weight is self.wo else F.linear)(x, weight, bias)

        return attend(self, x, linear=linear)

    program = normal(fn, **WEIGHTS)
    (out,) = [group for group in program.groups if group.key == Site("wo")]
    assert out.fold is Fold.QUANTIZE
