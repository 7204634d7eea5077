from __future__ import annotations

import pytest
import torch
import zoo
from kit import counts, error, normalized

import wancompile
from wancompile import pipeline
from wancompile.passes import NORMALIZE, RaiseSliceStores
from wancompile.pipeline import relative_error

X, W = torch.randn(2, 5, 8), torch.randn(8)


def add_behind_the_first(self, x):
    h = x * self.w
    h[:, 1:] = h[:, 1:] + x[:, 1:]
    return h.flatten(1)


def set_the_first(self, x):
    h = x * self.w
    h[:, :2] = x[:, 2:4]
    return h


def set_the_middle(self, x):
    h = x * self.w
    h[..., 2:5] = x[..., :3].double()
    return h + 1


def set_alike(self, x):
    h = x * self.w
    h[:, 1:] = x[:, :1]
    return h


def set_twice(self, x):
    h = torch.zeros_like(x)
    h[..., :3] = x[..., :3] * self.w[:3]
    h[..., 3:] = x[..., 3:]
    return h


def read_before_and_after(self, x):
    h = x * self.w
    before = h.abs().sum()  # a plain sum may cancel, and then shows fp32 rounding
    h[:, :1] = x[:, :1]
    return h + before


def store_into_a_copy(self, x):
    h = x * self.w
    copy = h.clone()
    copy[:, 1:] = x[:, 1:]
    return h + 2 * copy


def test_a_store_becomes_a_concatenation(golden):
    program = normalized(add_behind_the_first, X, RaiseSliceStores(), w=W)
    golden(program.print("canonical"))
    assert error(program, add_behind_the_first, torch.randn(3, 7, 8), w=W) < 1e-6


@pytest.mark.parametrize(
    ("fn", "cats"),
    [
        (set_the_first, 1),
        (set_the_middle, 1),
        (set_alike, 1),
        (set_twice, 2),
        (read_before_and_after, 1),
        (store_into_a_copy, 1),
    ],
)
def test_every_part(fn, cats):
    program = normalized(fn, X, RaiseSliceStores(), w=W)
    assert counts(program)["cat"] == cats
    assert "copy_" not in counts(program)
    assert error(program, fn, torch.randn(3, 7, 8), w=W) < 1e-6
    # Nothing that comes later forgets the order of stores and reads either.
    normal = pipeline.run(program, NORMALIZE[1:-4])
    assert error(normal, fn, torch.randn(3, 7, 8), w=W) < 1e-6


def through_an_older_view(self, x):
    h = x * self.w
    view = h.view(x.shape[0], -1)
    h[:, 1:] = x[:, 1:]
    return view


def through_an_older_view_of_a_view(self, x):
    h = x * self.w
    view = h.transpose(0, 1)[..., :4]
    h[:, 1:] = x[:, 1:]
    return view + 1


def into_a_view(self, x):
    h = x * self.w
    view = h.view(x.shape[0], -1)
    view[:, 1:] = 2 * view[:, 1:]
    return h


def into_the_input(self, x):
    x[:, 1:] = x[:, 1:] * self.w
    return x + 1


def of_another_shape(self, x):
    h = x * self.w
    h[:, 1:].copy_(x[:, :1])
    return h


def reading_what_it_returns(self, x):
    h = x * self.w
    return h[:, 1:].copy_(2 * x[:, 1:]).sum()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (through_an_older_view, "older than the store"),
        (through_an_older_view_of_a_view, "older than the store"),
        (reading_what_it_returns, "returns is read"),
        (into_a_view, "others may hold"),
        (into_the_input, "others may hold"),
        (of_another_shape, "another shape"),
    ],
)
def test_what_cannot_be_a_value_stays_and_says_why(fn, reason):
    program = normalized(fn, X.clone(), RaiseSliceStores(), w=W)
    assert counts(program)["copy_"] == 1
    [skipped] = program.records[-1].skipped
    assert reason in skipped.text
    assert skipped.source is not None


def test_poses_are_added_behind_the_reference_frame():
    model, inputs = zoo.make("animate", 2)
    program = wancompile.trace(model, inputs, dynamic=False)
    found = {(g.role, tuple(map(str, g.members))) for g in program.groups}
    assert found == zoo.expected_table("animate", 2)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    assert relative_error(program(**inputs)[0], expected) < 1e-5
