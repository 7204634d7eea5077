from __future__ import annotations

import copy

import pytest
import torch
import zoo
from rescale import inject_outliers
from torch import nn

from wancompile.pipeline import relative_error

VARIANTS = ["t2v", "i2v", "flf2v", "i2v22", "ti2v", "vace", "no_cross_norm"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays(variant, monkeypatch):
    # Wan casts to fp32 around its norms; without that, everything is computed in fp64.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, kwargs = zoo.make(variant)
    model = in_fp64(model)
    before = run(model, kwargs)
    inject_outliers(model)
    assert relative_error(run(model, kwargs), before) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_input_but_that_of_the_down_projection_gets_outliers(variant):
    model, kwargs = zoo.make(variant)
    members = [name for _, names in zoo.expected_table(variant) for name in names]
    before = spread(model, kwargs, members)
    after = spread(inject_outliers(model), kwargs, members)
    kept = {name for name in members if after[name] < 2.5 * before[name]}
    expected = {name for name in members if name.endswith("ffn.net.2")}
    if variant == "no_cross_norm":
        expected |= {name for name in members if name.endswith("attn2.to_q")}
    assert kept == expected


def test_the_seed_draws_and_sigma_scales():
    model, _ = zoo.make("t2v")
    one, same, other, none = (copy.deepcopy(model) for _ in range(4))
    inject_outliers(one, seed=1)
    inject_outliers(same, seed=1)
    inject_outliers(other, seed=2)
    inject_outliers(none, sigma=0)
    weights = [m.blocks[1].attn1.to_q.weight for m in (one, same, other, none, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[3], weights[4])


def test_fused_projections_are_refused():
    model, _ = zoo.make("fused")
    with pytest.raises(ValueError, match="fuse the projections afterwards"):
        inject_outliers(model)


def in_fp64(model: nn.Module) -> nn.Module:
    """Return the model in fp64; what diffusers would keep in fp32 follows."""
    return nn.Module._apply(model, lambda t: t.double() if t.is_floating_point() else t)


def run(model, kwargs):
    doubled = {name: t.double() if t.dim() > 2 else t for name, t in kwargs.items()}
    with torch.no_grad():
        return model(**doubled, return_dict=False)[0]


def spread(model, kwargs, names):
    """Largest over median channel amax of the input of each linear."""
    found = {}

    def hook(name):
        def look(module, args):
            amax = args[0].abs().flatten(0, -2).amax(0)
            found[name] = float(amax.max() / amax.median())

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return found
