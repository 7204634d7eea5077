from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from kit import counts, exported, run_pass

import wancompile
from wancompile import pipeline
from wancompile.errors import LevelError
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Role
from wancompile.passes import NORMALIZE
from wancompile.passes.observe import HEAD_LINE, LINE, Observe, buffer_name

X = torch.randn(2, 12, 8)
WEIGHTS = {name: torch.randn(8, 8) / 8**0.5 for name in ("wq", "wk", "wv", "wo")}


def heads(x):
    return x.unflatten(2, (2, 4)).transpose(1, 2)


def self_attention(self, x):
    q, k, v = (heads(F.linear(x, weight)) for weight in (self.wq, self.wk, self.wv))
    out = F.scaled_dot_product_attention(q, k, v)
    return F.linear(out.transpose(1, 2).flatten(2), self.wo)


def normal(fn):
    return pipeline.run(exported(fn, X, **WEIGHTS), NORMALIZE)


def model(variant, layers=2):
    wan, kwargs = zoo.make(variant, layers)
    return wancompile.trace(wan, kwargs, dynamic=False), kwargs


def channel_observers(program):
    return match.nodes_of(program.graph, torch.ops.wancompile.observe_channels.default)


def test_observers_read_what_the_groups_read(golden):
    after = run_pass(normal(self_attention), Observe(labels=2, rows=4))
    golden(after.print("canonical"))
    assert after.level is Level.OBSERVED
    assert counts(after)["observe_channels"] == 2
    assert counts(after)["observe_heads"] == 3


@pytest.mark.parametrize("variant", ["i2v", "fused_flf2v", "ti2v"])
def test_one_observer_per_producer(variant):
    before, _ = model(variant)
    after = run_pass(before, Observe())
    groups = {group.observer for group in before.groups}
    observed = [match.args(node)[0] for node in channel_observers(after)]
    assert len(observed) == len(set(observed)) == len(groups)
    nodes = match.by_site(after.graph)
    for group in after.groups:
        assert {match.args(nodes[site])[0] for site in group.sites} <= set(observed)


@pytest.mark.parametrize("variant", ["i2v", "fused_i2v"])
def test_all_blocks_share_the_observer_of_the_encoder_states(variant):
    before, _ = model(variant)
    shared = {Role.ATTN_KV, Role.ATTN_ADD_KV}
    observers = {role: set() for role in shared}
    for group in before.groups:
        if group.role in shared:
            observers[group.role].add(group.observer)
    assert [len(found) for found in observers.values()] == [1, 1]
    per_block = sum(group.role not in shared for group in before.groups)
    assert len(channel_observers(run_pass(before, Observe()))) == per_block + 2


@pytest.mark.parametrize("variant", ["i2v", "vace"])
def test_the_output_stays_bit_for_bit(variant):
    before, kwargs = model(variant, layers=1)
    after = run_pass(before, Observe())
    assert torch.equal(after(**kwargs)[0], before(**kwargs)[0])


def test_the_program_before_has_no_buffers():
    before = normal(self_attention)
    names = set(before.state)
    after = run_pass(before, Observe())
    after(x=X)
    assert set(before.state) == names
    assert {name for name in after.state if name not in names} >= {LINE, HEAD_LINE}


def test_only_self_attention_has_head_observers():
    before, _ = model("i2v", layers=1)
    after = run_pass(before, Observe())
    seen = {a.site for a in after.attentions if buffer_name(a.site, "q.low") in after.state}
    assert seen == {a.site for a in after.attentions if a.is_self}
    assert 0 < len(seen) < len(after.attentions)


def test_attention_without_a_head_dimension_is_left_alone():
    def fn(self, x):
        q, k, v = (F.linear(x, weight) for weight in (self.wq, self.wk, self.wv))
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.wo)

    after = run_pass(normal(fn), Observe())
    assert counts(after)["observe_channels"] == 2
    assert "observe_heads" not in counts(after)


def test_linears_without_a_group_are_not_observed():
    def fn(self, x):
        return F.linear(self_attention(self, F.linear(x, self.wq)), self.wk)

    before = normal(fn)
    after = run_pass(before, Observe())
    observed = {match.args(node)[0] for node in channel_observers(after)}
    nodes = match.by_site(after.graph)
    assert len(before.ungrouped) == 2
    assert not {match.args(nodes[one.site])[0] for one in after.ungrouped} & observed


def test_what_is_observed_is_not_observed_again():
    after = run_pass(normal(self_attention), Observe())
    with pytest.raises(LevelError, match="needs level NORMAL, the program is at OBSERVED"):
        run_pass(after, Observe())


def test_each_site_draws_its_own_sample_and_each_seed_another():
    def seeds(seed):
        after = run_pass(normal(self_attention), Observe(seed=seed))
        return [match.args(node)[-1] for node in channel_observers(after)]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1), *seeds(2**70)}) == 6
