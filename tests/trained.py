"""The trained models, compiled once for all tests of what a user would see of them."""

from __future__ import annotations

from functools import cache

import torch
from once import Traced
from torch import Tensor, nn

from training.classifier import Classifier
from wancompile import CompiledModel
from wancompile.demo import checkpoints
from wancompile.demo.conditions import prompt
from wancompile.demo.quality import psnr
from wancompile.demo.sampler import Request, sample

_STEPS = 4
_DIGITS = {"t2v": (0, 3, 7), "i2v": (1, 4)}


def request(name: checkpoints.Name, digits: tuple[int, ...], steps: int, seed: int) -> Request:
    """Return a request for a video of each digit."""
    frames = torch.cat([checkpoints.first_frame(d) for d in digits]) if name == "i2v" else None
    return Request(tuple(map(prompt, digits)), frames, steps=steps, seed=seed)


@cache
def original(name: checkpoints.Name) -> nn.Module:
    """Return a trained model in fp32."""
    return checkpoints.load(name)


@cache
def traced(name: checkpoints.Name) -> Traced:
    """Return it calibrated on digits and noise that `videos` has not."""
    model, asked = original(name), request(name, (2, 6), 3, 100)
    return Traced.on(model, lambda: sample(model, asked))


@cache
def compiled(name: checkpoints.Name, recipe: str) -> CompiledModel:
    """Return a trained model in 8 bits."""
    return traced(name).compiled(recipe)


@cache
def videos(name: checkpoints.Name, recipe: str = "") -> Tensor:
    """Return videos of a few digits, from the original if no recipe is given."""
    model = compiled(name, recipe) if recipe else original(name)
    return sample(model, request(name, _DIGITS[name], _STEPS, 0))


def recognised(name: checkpoints.Name, recipe: str) -> float:
    """Return the share of the videos whose digit is the one that was asked for."""
    return Classifier().accuracy(videos(name, recipe), torch.tensor(_DIGITS[name]))


def nearness(name: checkpoints.Name, recipe: str) -> float:
    """Return the mean PSNR of the videos in dB, against those of the original."""
    return float(psnr(videos(name, recipe), videos(name)).mean())


def check_smoothing(name: checkpoints.Name) -> None:
    """Assert that smoothing lowers the error of every role but of those that read a few words."""
    report = compiled(name, "int8").report
    assert {str(one.role) for one in report.roles} >= {
        "attn_qkv_proj",
        "attn_q_proj",
        "attn_kv_proj",
    }
    for one in report.roles:
        assert one.error_smoothed is not None
        assert one.error_plain is not None
        if one.smoothed:
            assert one.error_smoothed < one.error_plain
    # Prompts for ten digits have so few words that what suits some of them does not suit others.
    left = {str(one.role) for one in report.roles if not one.smoothed}
    assert left <= {"attn_kv_proj"}
    smoothings = [group.smoothing for group in report.groups if group.smoothing]
    refusals = [one.refusal for one in smoothings if not one.applied]
    assert all("the calibrated error" in refusal for refusal in refusals)
