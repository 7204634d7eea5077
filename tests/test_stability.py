"""How much two halves of a calibration differ: what stays, what moves, and what cannot say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo

import wancompile
from wancompile.errors import CalibrationError
from wancompile.ir.site import Site
from wancompile.quant.lines import HALVES, KINDS, PER_RANGE, half_of, line_of
from wancompile.quant.stats import ChannelStats, HeadStats, Stats

EDGES = (0.0, 500.0, 1000.0)
COLD, HOT = 0, 1
PROJECTION, ATTENTION = Site("blocks.0.to_q"), Site("blocks.0:attention")


def channels(lines, width=4):
    """Statistics of largest values by (half, kind, range)."""
    amax, count = torch.zeros(PER_RANGE * 2, width), torch.zeros(PER_RANGE * 2, dtype=torch.int64)
    for (half, kind, place), values in lines.items():
        line = line_of(half, KINDS.index(kind), place, 2)
        amax[line], count[line] = torch.tensor(values), 5
    return ChannelStats(amax, count, torch.zeros(1, width), torch.ones(1))


def stats(lines, **options):
    one = channels(lines)
    return Stats({PROJECTION: one}, edges=EDGES, roles={PROJECTION: "attn_qkv_proj"}, **options)


def only(found):
    (one,) = found.roles
    return one


def test_the_same_halves_do_not_move():
    both = {(half, "", COLD): [1.0, 2.0, 4.0, 0.0] for half in range(HALVES)}
    found = stats(both).stability()
    one = only(found)
    assert (one.name, one.sites) == ("attn_qkv_proj", 1)
    assert (one.amax_median, one.amax_worst, one.scale_worst) == (1, 1, 1)
    assert found.enough
    assert found.verdict == "enough samples: 99 in 100 scales move by 1.00 x at most"


def test_ratios_are_those_of_the_formula():
    even, odd = [1.0, 2.0, 4.0, 8.0], [2.0, 2.0, 1.0, 8.0]
    found = only(stats({(0, "", COLD): even, (1, "", COLD): odd}).stability())
    ratio = torch.tensor([2.0, 1.0, 4.0, 1.0], dtype=torch.float64)
    assert found.amax_worst == pytest.approx(4)
    assert found.amax_median == pytest.approx(float(ratio.median()))
    scales = [torch.tensor(half, dtype=torch.float64).sqrt() for half in (even, odd)]
    normed = [one / one.log().mean().exp() for one in scales]  # as the search normalizes them
    moved = torch.maximum(normed[0] / normed[1], normed[1] / normed[0])
    assert found.scale_worst == pytest.approx(float(moved.max()))
    assert found.scale_median == pytest.approx(float(moved.median()))


def test_a_common_factor_moves_values_and_no_smooth_scale():
    found = only(stats({(0, "", COLD): [1.0] * 4, (1, "", COLD): [3.0] * 4}).stability())
    assert found.amax_median == pytest.approx(3)
    assert found.scale_worst == pytest.approx(1)
    assert found.is_stable


def test_halves_that_differ_need_samples():
    unlike = {(0, "", COLD): [1.0] * 4, (1, "", COLD): [1.0] * 4}
    unlike |= {(0, "", HOT): [1.0, 1.0, 1.0, 9.0], (1, "", HOT): [9.0, 1.0, 1.0, 1.0]}
    found = stats(unlike, tally=(1,) * PER_RANGE * 2).stability()
    assert not found.enough
    assert found.verdict.startswith("add samples: between halves the scales of attn_qkv_proj move")
    assert found.verdict.endswith("most moves at timesteps 500 to 1000")
    cold, hot = found.ranges
    assert cold.scale_worst == 1
    assert hot.scale_worst == pytest.approx(3)


def test_a_channel_that_only_one_half_saw_moves_without_end():
    found = stats({(0, "", COLD): [1.0] * 4, (1, "", COLD): [1.0, 1.0, 1.0, 0.0]}).stability()
    assert only(found).amax_worst == torch.inf
    assert not found.enough


def test_only_what_both_halves_saw_is_compared():
    """Of another kind or range, other values say nothing."""
    lines = {(0, "cond", COLD): [1.0] * 4, (1, "cond", COLD): [1.0] * 4}
    lines |= {(0, "uncond", COLD): [1.0, 9.0, 50.0, 9.0], (1, "", HOT): [70.0, 1.0, 2.0, 4.0]}
    tally = [0] * PER_RANGE * 2
    for half, kind, place in lines:
        tally[line_of(half, KINDS.index(kind), place, 2)] = 1
    found = stats(lines, tally=tuple(tally)).stability()
    assert only(found).amax_worst == 1
    assert found.calls == (3, 1)
    assert found.verdict.endswith("too few calls to compare at timesteps 500 to 1000")


@pytest.mark.parametrize("lines", [{}, {(0, "", COLD): [1.0] * 4}])
def test_what_was_seen_once_cannot_be_compared(lines):
    found = stats(lines).stability()
    assert only(found).sites == 0
    assert not found.enough
    assert found.verdict.startswith("add samples: no range of timesteps was seen in two calls")
    assert "-" in str(found)


def test_heads_move_by_the_scale_of_a_head():
    """[half x range, heads, channels]; the largest magnitude of a head decides."""
    high = torch.full((4, 2, 3), -torch.inf)
    high[[line_of_heads(0), line_of_heads(1)]] = 1.0
    low = -high
    low[line_of_heads(1), 1, 2] = -3.0
    one = stats({(half, "", COLD): [1.0] * 4 for half in range(HALVES)})
    one = replace(one, heads={(ATTENTION, "k"): HeadStats(low, high)})
    _, found = one.stability().roles
    assert found.name == "attention k"
    assert found.scale_worst == found.amax_worst == pytest.approx(3)
    low[line_of_heads(1), 1, 2] = -1.3  # of a smooth scale that would be little
    assert not one.stability().enough
    low[line_of_heads(1), 1, 2] = -1.2
    assert one.stability().enough
    low[line_of_heads(1), 1, 2] = -3.0
    assert not one.stability().enough


def line_of_heads(half):
    return half * 2 + COLD


def test_statistics_without_halves_are_refused():
    short = ChannelStats(torch.ones(2, 4), torch.ones(2), torch.zeros(1, 4), torch.ones(1))
    with pytest.raises(CalibrationError, match="not kept by halves"):
        Stats({PROJECTION: short}, edges=EDGES).stability()
    whole = stats({})
    heads = {(ATTENTION, "q"): HeadStats(torch.ones(2, 1, 1), torch.ones(2, 1, 1))}
    with pytest.raises(CalibrationError, match="not kept by halves"):
        replace(whole, heads=heads).stability()


def test_calls_that_take_turns_are_dealt_to_both_halves():
    """The conditional ones come first in each pair, and nobody has said so."""
    halves = [half_of(number) for number in range(16)]
    assert sum(halves) == 8
    assert sum(halves[0::2]) == sum(halves[1::2]) == 4
    assert [half_of(number) for number in range(8)] == [0, 1, 1, 0, 1, 0, 0, 1]


# A model ---------------------------------------------------------------------------------------


def calls(count, spread):
    """Calls of one timestep; some channels of the text grow `spread` times from one to the next."""
    _, kwargs = zoo.make("t2v", 1)
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        text = torch.randn(kwargs["encoder_hidden_states"].shape, generator=generator)
        text[..., :3] *= spread**index
        yield {**kwargs, "encoder_hidden_states": text, "timestep": torch.tensor([500.0, 500.0])}


def test_a_model_says_whether_it_was_shown_enough():
    model, _ = zoo.make("t2v", 1)
    alike = wancompile.calibrate(model, calls(8, 1.0)).stability()
    assert alike.enough, str(alike)
    unlike = wancompile.calibrate(model, calls(8, 16.0)).stability()
    assert not unlike.enough
    alike_text, text = (
        next(one.amax_median for one in found.roles if one.name == "attn_kv_proj")
        for found in (alike, unlike)
    )
    assert alike_text < 1.3 < 2 < text
    once = wancompile.calibrate(model, calls(1, 1.0)).stability()
    assert once.verdict.startswith("add samples: no range")
    names = [one.name for one in alike.roles]
    assert "ffn_down_proj" in names
    assert names[-3:] == ["attention q", "attention k", "attention v"]
    text = str(alike)
    assert alike.verdict in text
    assert all(name in text for name in names)
    assert "500 to 600" in text
