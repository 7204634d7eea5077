"""All fusions together on Wans of every kind, and on one by another hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import NamedTuple

import clone
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wancompile
from wancompile import passes, pipeline
from wancompile.calibrate import Calibration
from wancompile.inspect import is_under
from wancompile.ir import text
from wancompile.ir.site import Role
from wancompile.pipeline import relative_error
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import resolve

Inputs = Mapping[str, Tensor]
RECIPES = ["int8-attention", "int8"]
"""Attention in 8 bits, and in floating point."""
ROTATED = {"int8-attention": (0, 1, 1), "int8": (2, 0, 0)}
"""How many ops of a block rotate: in floating point, by a static scale, by one for each query."""
LAYERS = 2


class Levels(NamedTuple):
    """A model at three levels: in floating point, rounded, and rounded in fewer ops."""

    normal: Program
    quantized: Program
    fused: Program


class Traced(NamedTuple):
    """A model in floating point, and what calibration learned of it."""

    normal: Program
    stats: Stats

    def levels(self, recipe: str = "int8-attention") -> Levels:
        resolved = resolve(recipe)
        smoothed = pipeline.run(self.normal, passes.smoothing(resolved, self.stats))
        quantized = pipeline.run(smoothed, passes.quantization(resolved, self.stats))
        return Levels(self.normal, quantized, pipeline.run(quantized, passes.FUSE))


def traced(model: nn.Module, inputs: Inputs, *, dynamic: bool = False) -> Traced:
    normal = wancompile.trace(model, inputs, dynamic=dynamic)
    calibration = Calibration(normal)
    calibration(**inputs)
    return Traced(normal, calibration.stats())


@functools.cache
def wan(variant: str) -> tuple[Traced, Inputs]:
    """Return a model of the zoo, traced for one size, and the call it was traced on."""
    model, inputs = zoo.make(variant, LAYERS)
    return traced(model, inputs), inputs


@functools.cache
def levels(variant: str, recipe: str = "int8-attention") -> Levels:
    return wan(variant)[0].levels(recipe)


def outputs(found: Levels, inputs: Inputs) -> list[Tensor]:
    return [program(**inputs)[0] for program in found]


def assert_within_rounding(found: Levels, inputs: Inputs) -> None:
    """In fp32 the fusions move the output by less than its 8 bits are off, and not away."""
    exact, quantized, fused = outputs(found, inputs)
    off = relative_error(quantized, exact)
    assert off > 1e-3
    assert relative_error(fused, quantized) < 0.5 * off
    assert relative_error(fused, exact) < 1.1 * off


def done(program: Program, block: str) -> dict[str, int]:
    """Return how much each fusion has done in a block."""
    names = [one.name for one in passes.FUSE]
    records = {record.name: record for record in program.records if record.name in names}
    return {name: sum(is_under(note.site, block) for note in records[name].done) for name in names}


def skips(program: Program, name: str) -> set[str]:
    (record,) = (one for one in program.records if one.name == name)
    return {note.text for note in record.skipped}


def expected(variant: str, block: str) -> dict[str, int]:
    """Return what is to be fused in a block; merged is what has several projections of one value.

    A sum goes to the linear before it; where its gate has a row per token it goes to the norm after
    it, and at the very end of the model, where no such norm follows, it is one op by itself.
    """
    groups = [members for _, members in zoo.expected_table(variant) if is_under(members[0], block)]
    has_rows, is_last = "ti2v" in variant, block == f"blocks.{LAYERS - 1}"
    norms = 3 if zoo.VARIANTS[variant].cross_norm else 2
    return {
        "merge_linears": sum(len(members) > 1 for members in groups),
        "fuse_gelu": 1,
        "fuse_linear_gelu": 0,  # no recipe here has static scales
        "fuse_rotary": 2,
        "fuse_linear_residual": 1 if has_rows else 3,
        "fuse_norm": norms,
        "fuse_residual": int(has_rows and is_last),
        "share_rows": norms + is_last if has_rows else 0,
    }


def image_states_are_rounded_once(program: Program) -> bool:
    """Whether the norm that ends the image's embedder rounds for all blocks, the first in name.

    It does where none of them smooths what it reads.
    """
    groups = [group for group in program.groups if group.role is Role.ATTN_ADD_KV]
    return bool(groups) and not any(one.smoothing and one.smoothing.applied for one in groups)


def blocks(variant: str) -> list[str]:
    table = zoo.expected_table(variant)
    qkv = (members[0] for role, members in table if role == "attn_qkv_proj")
    return sorted(name.partition(".attn1")[0] for name in qkv)


@pytest.mark.parametrize("variant", zoo.VARIANTS)
def test_every_block_of_every_wan_is_fused(variant):
    _, inputs = wan(variant)
    for recipe in RECIPES:
        found = levels(variant, recipe)
        for block in blocks(variant):
            wanted = expected(variant, block)
            if block == "blocks.0":
                wanted["fuse_norm"] += image_states_are_rounded_once(found.fused)
            assert done(found.fused, block) == wanted, block
        assert not skips(found.fused, "fuse_rotary") | skips(found.fused, "fuse_gelu")
        assert_within_rounding(found, inputs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_norms_of_cross_attention_stay(recipe):
    """Of q and k of video and text, and of k of the image; there nothing rotates."""
    found = levels("i2v", recipe)
    before, after = (text.op_counts(one.graph) for one in (found.quantized, found.fused))
    ops = ("norm_rotate", "norm_rotate_quantize", "norm_rotate_quantize_per_token")
    assert (before["rms_norm"], after["rms_norm"]) == (5 * LAYERS, 3 * LAYERS)
    assert [after.get(one, 0) for one in ops] == [LAYERS * count for count in ROTATED[recipe]]
    assert "stack" not in after


def test_what_is_merged_in_a_block():
    fused = levels("i2v").fused
    (record,) = (one for one in fused.records if one.name == "merge_linears")
    attn1, attn2 = "blocks.1.attn1", "blocks.1.attn2"
    assert [note.text for note in record.done if is_under(note.site, "blocks.1")] == [
        f"one product for {attn1}.to_q, {attn1}.to_k, {attn1}.to_v",
        f"one product for {attn2}.to_k, {attn2}.to_v",
        f"one product for {attn2}.add_k_proj, {attn2}.add_v_proj",
    ]


def test_control_hints_are_added_by_the_norm_that_follows():
    """What control blocks add to the stream comes from no 8-bit linear."""
    counts = text.op_counts(levels("vace").fused.graph)
    assert counts["residual_norm_quantize"] == len(zoo.vace_layers(LAYERS))


def test_rows_of_a_timestep_per_token_are_found_once():
    counts = text.op_counts(levels("ti2v").fused.graph)
    assert counts["repeated_rows"] == 1
    assert counts["residual_norm_quantize"] == 2 * LAYERS - 1


# Any size, any input ---------------------------------------------------------------------------


@functools.cache
def open_traced(variant: str) -> Traced:
    model, inputs = zoo.make(variant, 1)
    return traced(model, inputs, dynamic=True)


@functools.cache
def open_levels(variant: str, recipe: str) -> Levels:
    return open_traced(variant).levels(recipe)


@given(
    st.sampled_from(["t2v", "i2v", "ti2v"]),
    st.sampled_from(RECIPES),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=6)
def test_fusions_keep_the_function_at_other_sizes(variant, recipe, batch, seed):
    inputs = zoo.example(variant, 1, batch=batch, seed=seed)
    assert_within_rounding(open_levels(variant, recipe), inputs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_bf16_is_rounded_less_often(variant, recipe):
    """Beside the model of the same weights in fp32, the fused program is not the farther one."""
    model, inputs = zoo.make(variant, LAYERS, dtype=torch.bfloat16)
    found = traced(model, inputs).levels(recipe)
    with torch.no_grad():
        wider = {name: one.float() for name, one in inputs.items()}
        exact = copy.deepcopy(model).float()(**wider, return_dict=False)[0]
    _, quantized, fused = outputs(found, inputs)
    assert relative_error(fused, exact) < 1.02 * relative_error(quantized, exact)


# By another hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("style", ["matmul", "einsum", "bmm"])
def test_a_wan_by_another_hand(style, variant):
    """All is fused but a rotation that is spelled as a sum over whole heads."""
    model, inputs = zoo.make(variant, LAYERS)
    loom = clone.from_wan(model, clone.Taste(style, long_gelu=style == "bmm"))
    arguments = clone.arguments(inputs)
    both = traced(loom, arguments)
    wanted = expected(variant, "blocks.0")
    reasons = set()
    if style == "einsum":
        wanted["fuse_rotary"] = 0
        reasons = {"its operand is not rotated by pairs of channels"}
    for recipe in RECIPES:
        found = both.levels(recipe)
        assert skips(found.fused, "fuse_rotary") == reasons
        for row in range(LAYERS):
            assert done(found.fused, f"heddles.{row}") == wanted
        assert_within_rounding(found, arguments)
