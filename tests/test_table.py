"""The table of the seed: roles and members of every group, in every model and every spelling."""

from __future__ import annotations

from collections import Counter

import clone
import pytest
import torch
import traced
import zoo
from kit import table
from test_clone import TASTES

import wancompile
from wancompile.ir import match
from wancompile.ir.site import Fold, Role, Source
from wancompile.program import Program

# Faces come in batches whose number torch.export fixes, so Animate is traced for one size.
RESIZABLE = [variant for variant in zoo.VARIANTS if variant != "animate"]

FOLDS = {
    Role.ATTN_QKV: (Source.MODULATED_NORM, Fold.MODULATION),
    Role.ATTN_Q: (Source.AFFINE_NORM, Fold.AFFINE),
    Role.ATTN_KV: (Source.TEXT, Fold.QUANTIZE),
    Role.ATTN_ADD_KV: (Source.IMAGE, Fold.QUANTIZE),
    Role.ATTN_OUT: (Source.ATTENTION, Fold.VALUE_ROWS),
    Role.FFN_UP: (Source.MODULATED_NORM, Fold.MODULATION),
    Role.FFN_DOWN: (Source.ACTIVATION, Fold.QUANTIZE),
}
PER_TOKEN = {
    Role.ATTN_QKV: (Source.MODULATED_NORM, Fold.QUANTIZE),
    Role.FFN_UP: (Source.MODULATED_NORM, Fold.QUANTIZE),
}
NO_NORM = {Role.ATTN_Q: (Source.STREAM, Fold.QUANTIZE)}


def roles(program: Program) -> set[zoo.Group]:
    return {(str(group.role), group.members) for group in program.groups}


def left_out(program: Program) -> set[str]:
    return {one.site.path for one in program.ungrouped}


def folds(program: Program) -> dict[Role, tuple[Source, Fold]]:
    """Return source and fold per role; fails where blocks differ."""
    found: dict[Role, set[tuple[Source, Fold]]] = {}
    for group in program.groups:
        found.setdefault(group.role, set()).add((group.source, group.fold))
    return {role: one for role, (one,) in found.items()}


def check_partition(program: Program) -> None:
    """Every linear of the graph is listed once, as a member of a group or with a reason."""
    linears = [str(match.site(n)) for n in program.graph.nodes if match.is_float_linear(n)]
    members = [member for group in program.groups for member in group.members]
    assert Counter([*members, *(str(one.site) for one in program.ungrouped)]) == Counter(linears)
    assert all(one.reason for one in program.ungrouped)


@pytest.mark.parametrize("variant", RESIZABLE)
def test_every_model_for_any_size(variant):
    program = traced.dynamic(variant)[-1]
    assert roles(program) == zoo.expected_table(variant)
    assert left_out(program) == zoo.expected_ungrouped(variant)
    check_partition(program)


@pytest.mark.parametrize("variant", zoo.VARIANTS)
def test_every_model_for_one_size_with_more_blocks(variant):
    program = traced.fixed(variant, 4)
    assert roles(program) == zoo.expected_table(variant, 4)
    assert left_out(program) == zoo.expected_ungrouped(variant, 4)
    check_partition(program)


@pytest.mark.parametrize("variant", RESIZABLE)
def test_source_and_fold_of_each_role(variant):
    expected = dict(FOLDS)
    if "ti2v" in variant:
        expected |= PER_TOKEN
    if "no_cross_norm" in variant:
        expected |= NO_NORM
    if "encoder_hidden_states_image" not in traced.dynamic(variant)[1]:
        del expected[Role.ATTN_ADD_KV]
    assert folds(traced.dynamic(variant)[-1]) == expected
    assert folds(traced.fixed(variant, 4)) == expected


def test_faces_are_encoder_states_that_every_adapter_reads():
    program = traced.fixed("animate", 4)
    adapters = [group for group in program.groups if group.members[0].startswith("face_adapter")]
    assert {(group.role, group.source, group.fold) for group in adapters} == {
        (Role.ATTN_Q, Source.STREAM, Fold.QUANTIZE),
        (Role.ATTN_KV, Source.TEXT, Fold.QUANTIZE),
        (Role.ATTN_OUT, Source.ATTENTION, Fold.QUANTIZE),
    }
    (reason,) = {group.fold_reason for group in adapters if group.role is Role.ATTN_OUT}
    assert "cannot be followed through aten.reshape" in reason


@pytest.mark.parametrize("variant", ["i2v", "ti2v", "no_cross_norm"])
def test_why_a_scale_stays_in_the_quantise_op(variant, golden):
    golden(table(traced.dynamic(variant)[-1]))


@pytest.mark.parametrize("variant", ["t2v", "ti2v", "i2v22", "vace", "no_cross_norm", "fused"])
@pytest.mark.parametrize("tokens", [77, 300])
def test_the_number_of_text_tokens_does_not_matter(variant, tokens):
    """Models with image states are left out: diffusers cuts them off at 512 text tokens."""
    model, kwargs = zoo.make(variant, 1)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :tokens]
    program = wancompile.trace(model, kwargs, dynamic=False)
    assert roles(program) == zoo.expected_table(variant, 1)


def test_the_image_branch_is_told_from_text_whatever_the_number_of_image_tokens():
    model, kwargs = zoo.make("i2v", 1)
    images = kwargs["encoder_hidden_states_image"]
    for tokens in (1, 512, 600):
        kwargs["encoder_hidden_states_image"] = images[:, :1].repeat(1, tokens, 1)
        program = wancompile.trace(model, kwargs, dynamic=False)
        assert roles(program) == zoo.expected_table("i2v", 1)


# The clone ------------------------------------------------------------------------------------


def trace_clone(variant: str, taste: clone.Taste, layers: int = 2, **options) -> Program:
    model, kwargs = zoo.make(variant, layers)
    loom = clone.from_wan(model, taste)
    return wancompile.trace(loom, clone.arguments(kwargs), **options)


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_the_clone(taste):
    program = trace_clone("i2v", taste, dynamic=False)
    assert roles(program) == clone.expected_table_clone(photo=True)
    assert left_out(program) == clone.expected_ungrouped_clone(photo=True)
    assert folds(program) == FOLDS
    check_partition(program)


@pytest.mark.parametrize("style", ["matmul", "einsum", "bmm"])
def test_the_clone_for_any_size_with_more_blocks_and_without_images(style):
    program = trace_clone("t2v", clone.Taste(style), layers=3)
    assert roles(program) == clone.expected_table_clone(3)
    assert left_out(program) == clone.expected_ungrouped_clone()
    assert folds(program) == {role: one for role, one in FOLDS.items() if role != Role.ATTN_ADD_KV}


@pytest.mark.parametrize("words_first", [False, True])
@pytest.mark.parametrize("split", ["count", "fixed"])
@pytest.mark.parametrize("sum_photo_first", [False, True])
def test_neither_the_order_of_states_nor_of_the_sum_matters(words_first, split, sum_photo_first):
    taste = clone.Taste(split=split, words_first=words_first, sum_photo_first=sum_photo_first)
    program = trace_clone("i2v", taste, layers=1, dynamic=False)
    assert roles(program) == clone.expected_table_clone(1, photo=True)


@pytest.mark.parametrize("tokens", [77, 300])
def test_a_clone_that_counts_takes_any_number_of_words(tokens):
    model, kwargs = zoo.make("i2v", 1)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :tokens]
    loom = clone.from_wan(model)
    program = wancompile.trace(loom, clone.arguments(kwargs), dynamic=False)
    assert roles(program) == clone.expected_table_clone(1, photo=True)


def test_the_clone_called_by_position_in_an_order_of_its_own():
    model, kwargs = zoo.make("i2v")
    loom = clone.from_wan(model)
    arguments = clone.arguments(kwargs)
    ordered = tuple(arguments[name] for name in ("clock", "script", "canvas", "photo"))
    program = wancompile.trace(loom, ordered, dynamic=False)
    assert roles(program) == clone.expected_table_clone(photo=True)
    torch.testing.assert_close(program(*ordered), program(**arguments))
    with torch.no_grad():
        torch.testing.assert_close(program(*ordered), loom(*ordered), rtol=1e-4, atol=1e-4)
