"""The trained models through the whole compiler: what a user would see."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import wancompile
from training import digits
from training.classifier import Classifier
from wancompile import CompiledModel, Stats
from wancompile.demo import checkpoints
from wancompile.demo.conditions import prompt
from wancompile.demo.quality import psnr
from wancompile.demo.sampler import Request, calls, sample
from wancompile.pipeline import relative_error

_STEPS = 5
_DIGITS = {"t2v": (0, 2, 3, 7, 9), "i2v": (1, 4, 8)}


def request(name: checkpoints.Name, digits: tuple[int, ...], steps: int, seed: int) -> Request:
    frames = torch.cat([checkpoints.first_frame(d) for d in digits]) if name == "i2v" else None
    return Request(tuple(map(prompt, digits)), frames, steps=steps, seed=seed)


@cache
def original(name: checkpoints.Name) -> nn.Module:
    return checkpoints.load(name)


@cache
def stats(name: checkpoints.Name) -> Stats:
    model, asked = original(name), request(name, (0, 3, 6), 4, 100)
    return wancompile.calibrate(model, lambda: sample(model, asked))


@cache
def compiled(name: checkpoints.Name, recipe: str) -> CompiledModel:
    example = calls(original(name), [request(name, (2,), 1, 0)])[0]
    return wancompile.compile(
        original(name), recipe=recipe, stats=stats(name), example_inputs=example
    )


@cache
def videos(name: checkpoints.Name, recipe: str = "") -> Tensor:
    model = compiled(name, recipe) if recipe else original(name)
    return sample(model, request(name, _DIGITS[name], _STEPS, 0))


def test_the_classifier_can_be_trusted() -> None:
    _, held_out = digits.split()
    shown, labels = digits.videos(held_out, 200, torch.Generator().manual_seed(1))
    assert Classifier().accuracy(shown, labels) >= 0.97


CASES = [
    ("t2v", ""),
    ("t2v", "int8"),
    ("t2v", "int8-attention"),
    ("i2v", ""),
    ("i2v", "int8"),
    ("i2v", "fp8"),
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_digit_asked_for_is_seen(name: checkpoints.Name, recipe: str) -> None:
    labels = torch.tensor(_DIGITS[name])
    assert Classifier().accuracy(videos(name, recipe), labels) >= 0.9


@pytest.mark.parametrize(
    ("name", "recipe", "least"),
    [("t2v", "int8", 38), ("t2v", "int8-attention", 33), ("i2v", "int8", 38), ("i2v", "fp8", 28)],
)
def test_the_compiled_video_is_the_original_one(
    name: checkpoints.Name, recipe: str, least: float
) -> None:
    assert float(psnr(videos(name, recipe), videos(name)).mean()) > least


@pytest.mark.parametrize(
    ("recipe", "most"), [("int8-attention", 0.0045), ("int8-attention-fast", 0.007)]
)
def test_one_step_is_near_with_attention_in_8_bits(recipe: str, most: float) -> None:
    model = original("t2v")
    held_out = calls(model, [request("t2v", (2, 5), 4, 900)])[::2]
    with torch.no_grad():
        exact = [model(**call)[0] for call in held_out]
    found = [compiled("t2v", recipe)(**call)[0] for call in held_out]
    assert relative_error(torch.cat(found), torch.cat(exact)) < most


def test_int8_is_nearer_than_fp8() -> None:
    reference = videos("i2v")
    gain = psnr(videos("i2v", "int8"), reference) - psnr(videos("i2v", "fp8"), reference)
    assert float(gain.mean()) > 5


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_smoothing_lowers_the_error_of_every_role_but_of_a_few_words(
    name: checkpoints.Name,
) -> None:
    report = compiled(name, "int8").report
    roles = report.roles
    assert {str(one.role) for one in roles} >= {"attn_qkv_proj", "attn_q_proj", "attn_kv_proj"}
    assert ("attn_add_kv_proj" in {str(one.role) for one in roles}) == (name == "i2v")
    for one in roles:
        assert one.error_smoothed is not None
        assert one.error_plain is not None
        if one.smoothed:
            assert one.error_smoothed < one.error_plain
    # Prompts for ten digits have so few words that what suits some of them does not suit others.
    left = {str(one.role) for one in roles if not one.smoothed}
    assert left <= {"attn_kv_proj"}
    refusals = [
        g.smoothing.refusal for g in report.groups if g.smoothing and not g.smoothing.applied
    ]
    assert all("the calibrated error" in refusal for refusal in refusals)


def test_the_original_is_as_it_was() -> None:
    compiled("t2v", "int8")
    fresh = checkpoints.load("t2v").state_dict()
    assert all(torch.equal(one, fresh[key]) for key, one in original("t2v").state_dict().items())
