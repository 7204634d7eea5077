"""The trained image-to-video model through the whole compiler: what a user would see."""

from __future__ import annotations

import pytest
from trained import check_smoothing, compiled, nearness, recognised


@pytest.mark.parametrize("recipe", ["", "int8", "fp8"])
def test_the_digit_asked_for_is_seen(recipe: str) -> None:
    assert recognised("i2v", recipe) >= 0.9


@pytest.mark.parametrize(("recipe", "least"), [("int8", 38), ("fp8", 28)])
def test_the_compiled_video_is_the_original_one(recipe: str, least: float) -> None:
    assert nearness("i2v", recipe) > least


def test_int8_is_nearer_than_fp8() -> None:
    assert nearness("i2v", "int8") - nearness("i2v", "fp8") > 5


def test_smoothing_lowers_the_error_of_every_role_but_of_a_few_words() -> None:
    check_smoothing("i2v")


def test_image_states_have_a_role_of_their_own() -> None:
    assert "attn_add_kv_proj" in {str(one.role) for one in compiled("i2v", "int8").report.roles}
