from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import zoo
from kit import error, exported, run_pass
from rescale import inject_outliers

import wancompile
from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError
from wancompile.ir import text
from wancompile.ir.site import Fold, Role, Site
from wancompile.passes import NORMALIZE
from wancompile.passes.smooth import Smooth
from wancompile.recipe import QSpec, Recipe, Rule, resolve

INT8 = resolve("int8")
X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))


def tensors(dtype=torch.float32):
    """Weights that make outliers in every value a group reads, and take them back."""
    draw = torch.Generator().manual_seed(0)
    inputs, values = (1.5 * torch.randn(2, 8, generator=draw)).exp()
    square = {name: torch.randn(8, 8, generator=draw) / 8**0.5 for name in ("q", "k", "v", "o")}
    found = {
        "wq": square["q"] / inputs,
        "wk": square["k"] / inputs,
        "wv": square["v"] / inputs * values[:, None],
        "bv": torch.randn(8, generator=draw) * values,
        "wo": square["o"] / values,
        "gain": inputs,
        "shift": torch.randn(8, generator=draw) * inputs,
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def attend(self, y, value_weight="wv"):
    q, k = F.linear(y, self.wq), F.linear(y, self.wk)
    v = F.linear(y, getattr(self, value_weight), self.bv)
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return F.linear(out.transpose(1, 2).flatten(2), self.wo)


def modulated(self, x):
    return attend(self, F.layer_norm(x, (8,)) * self.gain + self.shift)


def affine(self, x):
    return attend(self, F.layer_norm(x, (8,), self.gain, self.shift))


def stream(self, x):
    return attend(self, x * self.gain)


def only(role, **options):
    """A recipe that quantizes the groups of one role."""
    return Recipe("one role", None, (Rule(role, QSpec("int8", **options)),))


def normal(fn, x=X, **weights):
    return pipeline.run(exported(fn, x, **(weights or tensors())), NORMALIZE)


def calibrated(program, *calls):
    calibration = Calibration(program)
    for call in calls or ({"x": X},):
        calibration(**call)
    return calibration.stats()


def smoothed(program, recipe, *calls):
    return run_pass(program, Smooth(recipe, calibrated(program, *calls)))


FOLDS = {
    Fold.MODULATION: (modulated, Role.ATTN_QKV),
    Fold.AFFINE: (affine, Role.ATTN_QKV),
    Fold.VALUE_ROWS: (stream, Role.ATTN_OUT),
    Fold.QUANTIZE: (stream, Role.ATTN_QKV),
}


@pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: fold.name.lower())
def test_the_scale_goes_to(fold, golden):
    fn, role = FOLDS[fold]
    before = normal(fn)
    after = smoothed(before, only(role))
    golden(text.diff(before.print(), after.print()))
    group = next(one for one in after.groups if one.role is role)
    assert group.fold is fold
    assert group.smoothing.error_smoothed < group.smoothing.error_plain / 3
    assert str(fold) in after.records[-1].done[0].text
    assert error(after, fn, X, **tensors()) < 1e-6


@pytest.mark.parametrize("fn", [modulated, affine, stream])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 3e-7), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_the_float_program_computes_what_it_did(fn, dtype, limit):
    weights, x = tensors(dtype), X.to(dtype)
    after = smoothed(normal(fn, x, **weights), INT8, {"x": x})
    assert all(group.smoothing.applied for group in after.groups)
    assert error(after, fn, torch.randn(3, 5, 8, dtype=dtype), **weights) < limit


@pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: fold.name.lower())
def test_the_groups_read_a_smoother_value(fold):
    fn, role = FOLDS[fold]
    before = normal(fn)
    after = smoothed(before, only(role))
    assert spread(after, role) < spread(before, role) / 3


def spread(program, role):
    """Largest over smallest channel amax of what the group of `role` reads."""
    group = next(one for one in program.groups if one.role is role)
    amax = calibrated(program).channels[group.observer].amax[0]
    return float(amax.max() / amax.min())


def test_another_reader_of_a_norm_reads_what_it_did():
    def fn(self, x):
        y = F.layer_norm(x, (8,), self.gain, self.shift)
        return attend(self, y) + y

    after = smoothed(normal(fn), only(Role.ATTN_QKV))
    assert after.groups[0].fold is Fold.QUANTIZE
    assert after.groups[0].smoothing.applied
    assert error(after, fn, X, **tensors()) < 1e-6


def test_a_recipe_may_forbid_it():
    before = normal(stream)
    after = smoothed(before, only(Role.ATTN_QKV, smooth=False))
    assert after.print() == before.print()
    assert [note.text for note in after.records[-1].skipped] == [
        "the recipe does not smooth this group"
    ]
    smoothing = after.groups[0].smoothing
    assert smoothing.error == smoothing.error_plain > smoothing.error_smoothed


def test_groups_in_floating_point_are_not_searched():
    before = normal(stream)
    after = smoothed(before, only(Role.ATTN_OUT))
    assert [group.smoothing is None for group in after.groups] == [True, False]


def test_what_gains_nothing_stays():
    # Signs are exact in 8 bits, so there is no error to lower.
    x = X.sign()
    weights = {name: tensor.sign() for name, tensor in tensors().items()}
    before = normal(stream, x, **weights)
    after = smoothed(before, only(Role.ATTN_QKV), {"x": x})
    assert after.print() == before.print()
    assert not after.groups[0].smoothing.applied
    note = after.records[-1].skipped[0]
    assert note.text == "smoothing does not lower the calibrated error"
    assert note.site == "wq"
    assert "in forward" in note.source


def test_a_scale_that_harms_other_tokens_stays():
    """The first channel is large in the tokens that choose, and in none of those that judge."""
    before = normal(stream, **{name: tensor.sign() for name, tensor in tensors().items()})
    stats = calibrated(before)
    patterns = torch.randperm(256, generator=torch.Generator().manual_seed(2))[:64]
    tokens = (patterns[:, None] >> torch.arange(8) & 1) * 2.0 - 1  # all signs, no two rows alike
    tokens[0::2, 0] *= 50
    site, found = next((site, one) for site, one in stats.channels.items() if str(site) == "wq")
    amax = tokens.abs().amax(0).expand_as(found.amax)
    crafted = replace(found, amax=amax, sample=tokens, priority=torch.arange(64.0))
    stats = replace(stats, channels={**stats.channels, site: crafted})
    after = run_pass(before, Smooth(only(Role.ATTN_QKV), stats))
    assert after.print() == before.print()
    smoothing = after.groups[0].smoothing
    assert smoothing.error_smoothed > smoothing.error_plain
    assert smoothing.error == smoothing.error_plain
    assert after.records[-1].skipped[0].text == "smoothing does not lower the calibrated error"


def test_a_shared_weight_stays():
    def fn(self, x):
        return attend(self, x * self.gain, value_weight="wk")

    weights = tensors()
    del weights["wv"]
    after = smoothed(normal(fn, **weights), only(Role.ATTN_QKV))
    assert not after.groups[0].smoothing.applied
    assert after.records[-1].skipped[0].text == "a weight of the group is used more than once"


def test_three_tokens_judge_nothing():
    before = normal(stream)
    after = smoothed(before, only(Role.ATTN_QKV), {"x": X[:1, :3]})
    assert after.groups[0].smoothing is None
    assert (
        after.records[-1].skipped[0].text
        == "only 3 of the 4 different tokens that it takes to judge a scale"
    )


def test_a_channel_that_never_spoke_keeps_its_weights():
    x = X.clone()
    x[..., 3] = 0
    after = smoothed(normal(stream), only(Role.ATTN_QKV), {"x": x})
    inverse = after.state[after.groups[0].smoothing.inverse]
    assert inverse[3] == 1
    assert (inverse != 1).sum() == 7


def elsewhere(site, stats):
    return Site("elsewhere"), stats


def wider(site, stats):
    return site, replace(stats, amax=stats.amax.repeat(1, 2))


@pytest.mark.parametrize("change", [elsewhere, wider])
def test_statistics_of_another_model_are_refused(change):
    program = normal(stream)
    stats = calibrated(program)
    channels = dict(change(site, one) for site, one in stats.channels.items())
    with pytest.raises(CalibrationError, match="they are of another model") as caught:
        run_pass(program, Smooth(INT8, replace(stats, channels=channels)))
    assert caught.value.site == "wq"
    assert caught.value.pass_name == "smooth"
    assert "in forward" in caught.value.source


# Whole models ---------------------------------------------------------------------------------

MODELS = ["t2v", "i2v", "flf2v", "ti2v", "vace", "no_cross_norm", "fused_i2v"]


@pytest.mark.parametrize("variant", MODELS)
def test_every_group_of_a_model_with_outliers_is_smoothed(variant):
    model, kwargs = zoo.make(variant.removeprefix("fused_"), layers=1)
    inject_outliers(model)
    if variant.startswith("fused_"):
        zoo.fuse(model)
    before = wancompile.trace(model, kwargs, dynamic=False)
    stats = calibrated(before, kwargs)
    after = pipeline.run(before, [Smooth(INT8, stats)], probe=pipeline.Probe(kwargs))
    table = {(str(group.role), group.members) for group in after.groups}
    assert table == zoo.expected_table(variant, layers=1)
    for group in after.groups:
        if has_outliers(variant, group):
            assert group.smoothing.applied, group.key
            assert group.smoothing.error < group.smoothing.error_plain / 3, group.key
    with torch.no_grad():
        expected = model(**kwargs, return_dict=False)[0]
    assert pipeline.relative_error(after(**kwargs)[0], expected) < 2e-6


def has_outliers(variant, group):
    """Whether `inject_outliers` reaches the group's input."""
    without = {Role.FFN_DOWN, Role.ATTN_Q} if variant == "no_cross_norm" else {Role.FFN_DOWN}
    return group.role not in without
