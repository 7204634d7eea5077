"""The trained text-to-video model through the whole compiler: what a user would see."""

from __future__ import annotations

import pytest
import torch
from trained import check_smoothing, compiled, nearness, original, recognised, request

from training import digits
from training.classifier import Classifier
from wancompile.demo import checkpoints
from wancompile.demo.sampler import calls
from wancompile.pipeline import relative_error


def test_the_classifier_can_be_trusted() -> None:
    _, held_out = digits.split()
    shown, labels = digits.videos(held_out, 200, torch.Generator().manual_seed(1))
    assert Classifier().accuracy(shown, labels) >= 0.97


@pytest.mark.parametrize("recipe", ["", "int8", "int8-attention"])
def test_the_digit_asked_for_is_seen(recipe: str) -> None:
    assert recognised("t2v", recipe) >= 0.9


@pytest.mark.parametrize(("recipe", "least"), [("int8", 38), ("int8-attention", 33)])
def test_the_compiled_video_is_the_original_one(recipe: str, least: float) -> None:
    assert nearness("t2v", recipe) > least


@pytest.mark.parametrize(
    ("recipe", "most"), [("int8-attention", 0.0045), ("int8-attention-fast", 0.007)]
)
def test_one_step_is_near_with_attention_in_8_bits(recipe: str, most: float) -> None:
    model = original("t2v")
    held_out = calls(model, [request("t2v", (5,), 4, 900)])[::2]
    with torch.no_grad():
        exact = [model(**call)[0] for call in held_out]
    found = [compiled("t2v", recipe)(**call)[0] for call in held_out]
    assert relative_error(torch.cat(found), torch.cat(exact)) < most


def test_smoothing_lowers_the_error_of_every_role_but_of_a_few_words() -> None:
    check_smoothing("t2v")
    assert "attn_add_kv_proj" not in {str(one.role) for one in compiled("t2v", "int8").report.roles}


def test_the_original_is_as_it_was() -> None:
    compiled("t2v", "int8")
    fresh = checkpoints.load("t2v").state_dict()
    assert all(torch.equal(one, fresh[key]) for key, one in original("t2v").state_dict().items())
