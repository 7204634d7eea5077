"""The work of the passes grows in step with the blocks of a model; counted in calls, not time."""

from __future__ import annotations

import cProfile
import pstats

import torch
import zoo
from small import plain, quantized

from wancompile import pipeline
from wancompile.export import export
from wancompile.passes import NORMALIZE, FoldConstants, Lower


def calls_of_passes(variant: str, layers: int) -> int:
    """Return how many Python calls all passes together make on a model of so many blocks."""
    model, kwargs = zoo.make(variant, layers)
    start = export(model, [kwargs], dynamic=False)
    profile = cProfile.Profile()
    profile.enable()
    program = quantized(pipeline.run(start, NORMALIZE), plain("int8"))
    pipeline.run(program, [FoldConstants(), Lower(torch.device("cpu"))])
    profile.disable()
    return pstats.Stats(profile).total_calls


def test_work_grows_linearly_in_blocks():
    calls_of_passes("i2v", 1)  # what is cached at the first use is not counted
    few, some, many = (calls_of_passes("i2v", layers) for layers in (2, 4, 8))
    assert many - some < 2.1 * (some - few)
