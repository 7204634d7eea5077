"""What a record of a run holds, and how two are compared."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from small import WEIGHTS, X, attend, normal, plain, quantized

import wancompile
from wancompile import passes, pipeline
from wancompile.calibrate import Calibration
from wancompile.gate import record
from wancompile.gate.check import check_records, inverses_of
from wancompile.gate.compare import error_of
from wancompile.gate.record import take, tokens_of
from wancompile.ir import match
from wancompile.ir.blocks import block_outputs, blocks
from wancompile.ir.site import Site
from wancompile.recipe import QSpec, Recipe, Rule, resolve
from wancompile.stream import Stream


@pytest.fixture(scope="module")
def wan():
    """A T2V model of two blocks, other inputs, its program, and statistics."""
    model, kwargs = zoo.make("t2v", 2)
    program = wancompile.trace(model, kwargs)
    calibration = Calibration(program)
    calibration(**kwargs)
    return model, zoo.example("t2v", 2), program, calibration.stats()


def climbed(program, recipe, stats):
    """Return a NORMAL program smoothed, and quantized."""
    chosen = resolve(recipe)
    smoothed = pipeline.run(program, passes.smoothing(chosen, stats))
    return smoothed, pipeline.run(smoothed, passes.quantization(chosen, stats))


def outputs_of(model, names, call):
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out)
        )
        for name in names
    ]
    with torch.no_grad():
        model(**call)
    for hook in hooks:
        hook.remove()
    return seen


# Samples ----------------------------------------------------------------------------------------


def test_short_values_are_kept_whole_and_long_ones_sampled():
    short = torch.randn(2, 60, 8)
    assert torch.equal(tokens_of(short), short)
    assert torch.equal(tokens_of(short[0, 0]), short[0, 0])
    long = torch.arange(1000.0)[None, :, None].expand(2, 1000, 8)
    sample = tokens_of(long)
    assert sample.shape == (2, 64, 8)
    assert sample[0, :, 0].diff().gt(0).all()
    assert 300 < sample.mean() < 700


def test_wide_values_give_fewer_tokens():
    wide = torch.zeros(1, 100, record.VALUES // 10)
    assert tokens_of(wide).shape[1] == 10
    assert tokens_of(wide.expand(100, -1, -1)).shape == (100, 4, record.VALUES // 10)


def test_every_program_gives_the_same_tokens_in_every_layout():
    x = torch.randn(2, 3, 500, 4)  # [B, H, S, D]
    joined = x.transpose(1, 2).flatten(2)
    heads = tokens_of(x).transpose(1, 2).flatten(2)
    assert torch.equal(tokens_of(joined), heads)


# Records ----------------------------------------------------------------------------------------


def test_a_record_holds_what_the_model_computes(wan):
    model, call, program, _ = wan
    output, found = take(program, call)
    names = ["blocks.0", "blocks.1", "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"]
    seen = outputs_of(model, names, call)
    assert list(found.blocks) == ["blocks.0", "blocks.1"]
    for name in names:
        kept = found.blocks[name] if name in found.blocks else found.sites[Site.parse(name)]
        torch.testing.assert_close(kept, tokens_of(seen[name]), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = model(**call, return_dict=False)[0]
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.output[0], output[0])
    assert (found.broken, found.clipped, found.own) == ({}, {}, {})


def test_only_the_sites_asked_for_are_kept(wan):
    _, call, program, _ = wan
    site = Site("blocks.1.attn1:attention")
    _, found = take(program, call, [site], blocks=False)
    assert list(found.sites) == [site]
    assert found.blocks == {}
    whole = program.values([site], **call)[site]
    assert torch.equal(found.sites[site], tokens_of(whole.transpose(1, 2).flatten(2)))


def test_a_streamed_program_has_the_same_record(wan, monkeypatch):
    _, call, program, _ = wan
    monkeypatch.setattr(record, "place", lambda one, device: Stream(one, torch.device("cpu")))
    _, streamed = take(program, call)
    monkeypatch.undo()
    _, plain_run = take(program, call)
    assert streamed.sites.keys() == plain_run.sites.keys()
    assert all(torch.equal(streamed.sites[one], plain_run.sites[one]) for one in streamed.sites)
    assert all(torch.equal(streamed.blocks[one], plain_run.blocks[one]) for one in streamed.blocks)


def test_nan_and_infinity_are_counted_where_they_are():
    def spoiled(self, x):
        return attend(self, torch.where(x > 2.5, x * 1e39, x))

    program = normal(spoiled, **WEIGHTS)
    x = X.clamp(-2, 2)
    assert take(program, {"x": x})[1].broken == {}
    x[1, 3, 5] = 3.0
    broken = take(program, {"x": x})[1].broken
    # An infinite input spoils all 12 outputs of its token, and attention the 5 tokens of its video.
    assert [broken[name] for name in ("wq", "wk", "wv")] == [12, 12, 12]
    assert broken["attention"] == broken["wo"] == broken["output"] == 60


def test_blocks_are_those_of_the_largest_list():
    sites = ["head.0.a", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "out"]
    assert blocks(sites) == {site: site[:8] for site in sites[1:5]}


def test_what_leaves_a_block_is_the_stream(wan):
    program = wan[2]
    found = block_outputs(program.graph)
    assert sorted(found.values()) == ["blocks.0", "blocks.1"]
    assert all(node.target is torch.ops.aten.add.Tensor for node in found)


# 8-bit attention --------------------------------------------------------------------------------


def small_attention(dtype, x=X):
    program = normal(attend, **WEIGHTS)
    calibration = Calibration(program)
    calibration(x=x)
    return program, quantized(program, plain(dtype, attention=dtype), calibration.stats())


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_own_error_of_an_attention_is_that_on_its_operands(dtype):
    _, program = small_attention(dtype)
    (attention,) = program.attentions
    _, found = take(program, {"x": X})
    operands = {}

    def keep(node, given, result):
        name = str(node.target)
        if "quantize_per" in name and given[0].dim() == 4:
            operands.setdefault("floats", []).append(given[0])
        if "scaled_attention" in name:
            operands["v"], operands["out"] = given[2], result

    program.watched(keep, x=X)
    (q, k), v = operands["floats"], operands["v"]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = (operands["out"] - expected).norm() / expected.norm()
    assert found.own[attention.site] == pytest.approx(float(error), rel=1e-3)
    assert 1e-3 < error < 0.1


def test_fused_programs_lack_the_operands_and_count_what_is_clipped(wan):
    _, call, program, stats = wan
    _, after = climbed(program, "int8-attention", stats)
    fused = pipeline.run(after, passes.FUSE)
    assert "norm_rotate_quantize" in fused.print()
    found, unfused = take(fused, call, blocks=False)[1], take(after, call)[1]
    sites = {one.site for one in program.attentions if one.is_self}
    assert found.own == {}
    assert unfused.own.keys() == unfused.clipped.keys() == found.clipped.keys() == sites


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        (None, ["scaled_linear_residual"] * 2),
        (Rule("blocks.*.ffn.*", None), ["getitem", "add_gated"]),
    ],
)
def test_fused_programs_tell_the_sum_that_a_block_ends_in(wan, rule, ends):
    """Where the last linear is in float, the next block's op makes the sum, and yields it, too."""
    model, call, program, stats = wan
    recipe = Recipe("mine", QSpec("int8"), () if rule is None else (rule,))
    fused = pipeline.run(climbed(program, recipe, stats)[1], passes.FUSE)
    found = [match.target_name(node) for node in block_outputs(fused.graph)]
    assert all(end in name for end, name in zip(ends, found, strict=True))
    taken = take(fused, call, fused=True)[1].blocks
    exact = outputs_of(model, ["blocks.0", "blocks.1"], call)
    assert taken.keys() == exact.keys()
    for path, sample in taken.items():
        error = error_of(path, [(sample, tokens_of(exact[path]))])
        assert 1e-3 < error.relative < 0.02


def test_what_else_a_block_ends_in_is_not_told_of_fused_programs():
    """A wrong value would look like an error of the whole."""
    model, call = zoo.make("vace", 1)
    program = wancompile.trace(model, call)
    assert take(program, call)[1].blocks.keys() == {"vace_blocks.0"}  # it ends in a projection
    assert take(program, call, fused=True)[1].blocks == {}


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_values_with_the_largest_code_are_counted(dtype):
    _, program = small_attention(dtype)
    (attention,) = program.attentions
    inside = take(program, {"x": X})[1].clipped[attention.site]
    outside = take(program, {"x": 4 * X})[1].clipped[attention.site]
    assert inside < 0.1  # 120 values, and one of each head is the largest
    assert outside > 0.2
    rounded = []

    def keep(node, given, result):
        if "quantize_per_head" in str(node.target):
            rounded.append(result.float().abs())

    program.watched(keep, x=4 * X)
    # Queries in int8 have scales of their own, of which each has a value of the largest code.
    assert len(rounded) == {"int8": 1, "fp8": 2}[dtype]
    largest = {"int8": 127, "fp8": 448}[dtype]
    shares = [float((one == largest).float().mean()) for one in rounded]
    assert outside >= max(shares) > 0.2


# Comparing --------------------------------------------------------------------------------------


def test_an_error_is_pooled_over_calls():
    pairs = [(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])), (torch.ones(4), torch.ones(4))]
    found = error_of("here", pairs, "role")
    assert found.relative == pytest.approx(math.sqrt(16 / 13))
    assert found.sqnr == pytest.approx(-10 * math.log10(16 / 13))
    assert found.cosine == pytest.approx(13 / math.sqrt(29 * 13))
    assert (found.site, found.role) == ("here", "role")


def test_nan_is_no_small_error():
    found = error_of("here", [(torch.tensor([math.nan, 1.0]), torch.ones(2))])
    assert not found.relative < math.inf
    assert not found.sqnr < math.inf
    same = error_of("here", [(torch.zeros(3), torch.zeros(3))])
    assert (same.relative, same.sqnr, same.cosine) == (0.0, math.inf, 1.0)


def test_what_smoothing_scales_is_scaled_back(wan):
    """Values and attention outputs of a smoothed float program are those of the original."""
    _, call, program, stats = wan
    smoothed = pipeline.run(program, passes.smoothing(resolve("int8"), stats))
    inverses = inverses_of(smoothed)
    assert {Site("blocks.0.attn1.to_v"), Site("blocks.0.attn1:attention")} <= inverses.keys()
    actual, expected = (take(one, call)[1] for one in (smoothed, program))
    found = check_records(smoothed, [actual], [expected], inverses=inverses)
    assert len(found.sites) == len(expected.sites)
    assert max(one.relative for one in found.sites) < 1e-5
    left_out = check_records(smoothed, [actual], [expected])
    names = {one.site for one in found.sites} - {one.site for one in left_out.sites}
    assert names == {str(site) for site in inverses}


def test_the_record_of_a_quantized_program_is_near(wan):
    _, call, program, stats = wan
    smoothed, after = climbed(program, "int8", stats)
    both = [take(one, call)[1] for one in (after, program)]
    found = check_records(after, both[:1], both[1:], inverses=inverses_of(smoothed))
    assert {one.site for one in found.blocks} == {"blocks.0", "blocks.1"}
    assert all(1e-4 < one.relative < 0.02 for one in (*found.blocks, *found.outputs))
    in_blocks = [one for one in found.sites if one.site.startswith("blocks.")]
    assert all(1e-4 < one.relative < 0.05 for one in in_blocks)
