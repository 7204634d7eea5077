"""Statistics: merging two runs is one longer run, and files are ours or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_smooth import X, normal, stream

from wancompile import ops
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError
from wancompile.ir.site import Site
from wancompile.quant.lines import HALVES
from wancompile.quant.stats import FORMAT, ChannelStats, HeadStats, Stats

SITE, ATTENTION = Site("blocks.0.to_q", 1), Site("blocks.0.attn:attention")


def observed(x, seed, label=0, size=8):
    """What one observer with two ranges and `size` rows sees of x [rows, channels]."""
    channels = x.shape[1]
    amax, count = torch.zeros(2, channels), torch.zeros(2, dtype=torch.int64)
    sample = torch.zeros(size, channels)
    priority = torch.full((size,), torch.inf, dtype=torch.float64)
    ops.observe_channels(x, amax, count, sample, priority, torch.tensor(label), seed)
    return ChannelStats(amax, count, sample, priority)


def run(x, seed, calls=1):
    rows = x[:2].reshape(2, 1, -1)
    heads = {(ATTENTION, "q"): HeadStats(rows.amin(0, keepdim=True), rows.amax(0, keepdim=True))}
    return Stats({SITE: observed(x, seed)}, heads, (0.0, 500.0, 1000.0), calls, (seed,))


def same(a, b):
    """Whether two statistics hold the same numbers."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


draws = st.tuples(st.integers(4, 40), st.integers(0, 1))


@given(st.lists(draws, min_size=3, max_size=3), st.integers(0, 2**60))
@settings(deadline=None, max_examples=40)
def test_merging_is_commutative_and_associative(parts, first_seed):
    generator = torch.Generator().manual_seed(first_seed % 1000)
    a, b, c = (
        observed(torch.randn(rows, 3, generator=generator), first_seed + index, label, size=16)
        for index, (rows, label) in enumerate(parts)
    )
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_a_merged_sample_is_drawn_from_both(rows, others):
    x, y = torch.randn(rows, 2), torch.randn(others, 2) + 100
    merged = observed(x, 1).merge(observed(y, 2))
    everything = torch.cat([x, y])
    assert len(merged.tokens) == min(8, rows + others)
    assert all((everything == row).all(1).any() for row in merged.tokens)


def test_the_smaller_sample_decides():
    x, y = torch.randn(100, 2), torch.randn(100, 2)
    small, large = observed(x, 1, size=4), observed(y, 2, size=32)
    both = observed(x, 1, size=100).merge(observed(y, 2, size=100))
    merged = large.merge(small)
    assert same(merged, small.merge(large))
    assert torch.equal(merged.sample, both.sample[:4])


def test_a_merged_sample_is_uniform():
    x, y = torch.zeros(30, 1), torch.ones(90, 1)
    x += torch.arange(30)[:, None] / 1000
    y += torch.arange(90)[:, None] / 1000
    from_y = sum(
        int((observed(x, 2 * s).merge(observed(y, 2 * s + 1)).tokens >= 1).sum())
        for s in range(200)
    )
    # 200 samples of 8 rows, three quarters of them from y: 1200 expected, standard deviation 17
    assert abs(from_y - 1200) < 85


def test_two_halves_merge_into_one_run():
    program = normal(stream)
    calls = [{"x": torch.randn(2, 5, 8)} for _ in range(4)]
    whole, first, second = (Calibration(program, seed=seed) for seed in (0, 1, 2))
    for index, call in enumerate(calls):
        whole(**call)
        (first if index < 2 else second)(**call)
    one, two = whole.stats(), first.stats().merge(second.stats())
    assert two.calls == one.calls == 4
    assert two.seeds == (1, 2)
    for site, expected in one.channels.items():
        # Which half a call goes to depends on those before it.
        amax, count = two.channels[site].amax, two.channels[site].count
        assert torch.equal(by_half(amax).amax(0), by_half(expected.amax).amax(0))
        assert torch.equal(by_half(count).sum(0), by_half(expected.count).sum(0))
    assert one.heads.keys() == two.heads.keys()
    for key, expected in one.heads.items():
        assert torch.equal(by_half(two.heads[key].low).amin(0), by_half(expected.low).amin(0))
        assert torch.equal(by_half(two.heads[key].high).amax(0), by_half(expected.high).amax(0))


def by_half(lines):
    return lines.view(HALVES, -1, *lines.shape[1:])


def test_the_same_seed_is_refused():
    a, b, c = run(torch.randn(5, 4), 1), run(torch.randn(5, 4), 2), run(torch.randn(5, 4), 1)
    with pytest.raises(CalibrationError, match="drew with the same seed"):
        a.merge(c)
    with pytest.raises(CalibrationError, match="drew with the same seed"):
        a.merge(b).merge(c)


@pytest.mark.parametrize(
    "change",
    [
        lambda stats: replace(stats, edges=(0.0, 700.0, 1000.0)),
        lambda stats: replace(stats, channels={Site("other"): stats.channels[SITE]}),
        lambda stats: replace(stats, channels={SITE: observed(torch.randn(4, 6), 2)}),
        lambda stats: replace(stats, heads={}),
        lambda stats: replace(stats, heads={(ATTENTION, "q"): HeadStats(*torch.ones(2, 1, 1, 3))}),
    ],
    ids=["ranges", "sites", "widths", "no heads", "head widths"],
)
def test_statistics_of_different_models_are_refused(change):
    mine, other = run(torch.randn(5, 4), 1), change(run(torch.randn(5, 4), 2))
    with pytest.raises(CalibrationError, match="different models or ranges"):
        mine.merge(other)
    with pytest.raises(CalibrationError, match="different models or ranges"):
        other.merge(mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path, dtype):
    stats = replace(run(torch.randn(5, 4), 6, calls=3), seeds=(2**70,))
    stats = stats.merge(run(torch.randn(50, 4), 7))
    one = stats.channels[SITE]
    channels = {SITE: replace(one, sample=one.sample.to(dtype)), Site("a/b"): observed(X[0], 1)}
    stats = replace(stats, channels=channels)
    stats.save(tmp_path / "stats.safetensors")
    back = Stats.load(tmp_path / "stats.safetensors")
    assert (back.edges, back.calls, back.seeds) == (stats.edges, 4, (2**70, 7))
    assert back.channels.keys() == channels.keys()
    assert all(same(back.channels[site], channels[site]) for site in channels)
    assert back.channels[SITE].sample.dtype == dtype
    assert back.heads.keys() == {(ATTENTION, "q")}
    assert same(back.heads[ATTENTION, "q"], stats.heads[ATTENTION, "q"])


def test_what_calibration_learned_can_be_saved(tmp_path):
    calibration = Calibration(normal(stream))
    calibration(x=X)
    stats = calibration.stats()
    stats.save(tmp_path / "stats.safetensors")
    back = Stats.load(tmp_path / "stats.safetensors")
    assert back.channels.keys() == stats.channels.keys()
    assert back.heads.keys() == stats.heads.keys()
    assert len(back.heads) == 3


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        Stats.load(path)
    path.write_bytes(b"no statistics")
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        Stats.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CalibrationError, match=f"no statistics of format {FORMAT}"):
        Stats.load(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "wancompile-stats-0"})
    with pytest.raises(CalibrationError, match=f"no statistics of format {FORMAT}"):
        Stats.load(path)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    run(torch.randn(5, 4), 1).save(path)
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        Stats.load(path)


GOOD = {
    "edges": [0, 1],
    "calls": 1,
    "seeds": [0],
    "tally": [],
    "roles": {},
    "timesteps": None,
    "model": "",
}
BROKEN = [{"edges": 1}, {"timesteps": [3]}, {"roles": []}, {"tally": None}, {"calls": "many"}]


@pytest.mark.parametrize(
    "facts", ["{", "[]", '{"calls": 1}', *(json.dumps(GOOD | one) for one in BROKEN)]
)
def test_broken_facts_are_refused(tmp_path, facts):
    path = tmp_path / "stats.safetensors"
    tensors = saved_tensors(path)
    save_file(tensors, path, metadata={"format": FORMAT, "facts": facts})
    with pytest.raises(CalibrationError, match="is incomplete"):
        Stats.load(path)


def test_a_missing_tensor_is_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    tensors = saved_tensors(path)
    del tensors[f"channels/{SITE}/count"]
    save_file(tensors, path, metadata={"format": FORMAT, "facts": json.dumps(GOOD)})
    with pytest.raises(CalibrationError, match="is incomplete"):
        Stats.load(path)


def saved_tensors(path):
    run(torch.randn(5, 4), 1).save(path)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_range_of_a_head_spans_all_timesteps():
    unseen = torch.full((1, 2), torch.inf)
    low = torch.stack([torch.tensor([[-1.0, 2.0]]), unseen, torch.tensor([[-3.0, 4.0]])])
    high = torch.stack([torch.tensor([[2.0, 3.0]]), -unseen, torch.tensor([[1.0, 8.0]])])
    heads = HeadStats(low, high)
    assert heads.amax.tolist() == [[3.0, 8.0]]
    assert heads.middle.tolist() == [[-0.5, 5.0]]
    assert heads.half_width.tolist() == [[2.5, 3.0]]
