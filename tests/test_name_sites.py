from __future__ import annotations

import torch
import torch.nn.functional as F
from kit import before, exported, run_pass
from small import WEIGHTS, X, attend, heads, joined
from torch import nn

from wancompile.export import export
from wancompile.ir import match
from wancompile.ir.site import Site
from wancompile.passes import NameSites


def named(program):
    """Return the sites in execution order, after the passes before `NameSites` and it."""
    return list(match.by_site(run_pass(before(program, NameSites), NameSites()).graph))


def test_a_linear_is_called_after_its_weight(golden):
    program = run_pass(before(exported(attend, X, **WEIGHTS), NameSites), NameSites())
    golden(program.print("canonical"))


def test_calls_are_counted_per_weight():
    def fn(self, x):
        y = F.linear(x, self.wq) + F.linear(x, self.wk)
        return F.linear(F.linear(y, self.wq), self.wq)

    program = exported(fn, X, wq=WEIGHTS["wq"], wk=WEIGHTS["wk"])
    assert named(program) == [Site("wq"), Site("wk"), Site("wq", 1), Site("wq", 2)]
    assert [str(site) for site in named(program)] == ["wq", "wk", "wq#1", "wq#2"]


class Attention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.one, self.two, self.inner = nn.Linear(12, 12), nn.Linear(12, 12), inner

    def forward(self, x):
        q = heads(self.one(x))
        y = joined(F.scaled_dot_product_attention(q, q, q))
        z = joined(F.scaled_dot_product_attention(q, q + 1, q))
        return self.two(self.inner(y + z))


def test_modules_give_paths_and_attentions_are_counted_apart():
    program = export(Attention(nn.Linear(12, 12, bias=False)), [{"x": X}])
    assert [str(site) for site in named(program)] == [
        "one",
        "attention",
        "attention#1",
        "inner",
        "two",
    ]
    program = export(Attention(Attention(nn.Identity())), [{"x": X}])
    assert [str(site) for site in named(program)] == [
        "one",
        "attention",
        "attention#1",
        "inner.one",
        "inner:attention",
        "inner:attention#1",
        "inner.two",
        "two",
    ]


def test_a_module_of_two_names_is_called_by_one():
    shared = nn.Linear(12, 12)
    program = export(nn.Sequential(shared, nn.ReLU(), shared), [{"input": X}])
    first, second = named(program)
    assert first.path == second.path
    assert first.path in {"0", "2"}
    assert (first.call, second.call) == (0, 1)


def test_every_program_of_a_model_has_the_same_sites():
    model = Attention(nn.Linear(12, 12))
    fixed = export(model, [{"x": torch.ones(1, 3, 12)}], dynamic=False)
    assert named(fixed) == named(export(model, [{"x": X}, {"x": torch.ones(3, 9, 12)}]))


def test_a_computed_weight_is_called_after_the_stored_one():
    def fn(self, x):
        return F.linear(x, self.wq * 2) + F.linear(x, self.wk.to(torch.float64).to(x.dtype))

    program = exported(fn, X, wq=WEIGHTS["wq"], wk=WEIGHTS["wk"])
    assert [str(site) for site in named(program)] == ["wq", "wk"]
