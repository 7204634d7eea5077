"""Branches of low rank: their ops against fp64, their place in a graph, the kernels they get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import CHANNELS, WEIGHTS, X, attend, fused, normal, plain, quantized
from torch import Tensor

from wancompile import ops, pipeline
from wancompile.ir import edit, match, text
from wancompile.kernels import base
from wancompile.passes import lowering
from wancompile.passes.add_low_rank import AddLowRank, Slot
from wancompile.program import Program
from wancompile.quant.numerics import FP8, INT8
from wancompile.recipe import Recipe

low_rank = torch.ops.wancompile
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RANK = 16


def op_args(
    dtype: torch.dtype, kind: torch.dtype = torch.float32, one_scale: bool = False
) -> tuple:
    m, k, n = 7, 48, 24
    x, x_scale = ops.quantize_per_token(torch.randn(1, m, k), None, dtype)
    w, w_scale = ops.quantize_per_token(torch.randn(n, k), None, dtype)
    low, up = torch.randn(1, m, RANK).to(kind), torch.randn(n, RANK).to(kind)
    scale = x_scale[0, 0] if one_scale else x_scale
    return x, scale, w, w_scale, torch.randn(n), low, up, torch.float32


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_ops_are_the_float64_products(dtype, kind, one_scale):
    x, x_scale, w, w_scale, bias, low, up, _ = given = op_args(dtype, kind, one_scale)
    down = torch.randn(RANK, x.shape[-1]).to(kind)
    tokens = x.double() * x_scale
    found = ops.low_rank_down(x, x_scale, down)
    assert found.dtype == kind
    tolerance = {"rtol": torch.finfo(kind).eps, "atol": 1e-4}
    torch.testing.assert_close(found.double(), tokens @ down.double().t(), **tolerance)
    exact = tokens @ (w.double() * w_scale).t() + low.double() @ up.double().t() + bias
    out = ops.scaled_linear_low_rank(*given)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_branch_of_zeros_changes_no_bit(dtype):
    x, x_scale, w, w_scale, bias, low, up, out = op_args(dtype)
    with_branch = ops.scaled_linear_low_rank(x, x_scale, w, w_scale, bias, low, 0 * up, out)
    assert torch.equal(with_branch, ops.scaled_linear(x, x_scale, w, w_scale, bias, out))


def test_opcheck():
    given = op_args(INT8)
    torch.library.opcheck(low_rank.scaled_linear_low_rank.default, given)
    torch.library.opcheck(low_rank.low_rank_down.default, (*given[:2], torch.randn(RANK, 48)))


def small(recipe: Recipe) -> Program:
    return fused(quantized(normal(attend, **WEIGHTS), recipe))


def slots(program: Program) -> tuple[Slot, ...]:
    names = dict.fromkeys(w.data or w.name for group in program.groups for w in group.weights)
    return tuple(Slot(name, RANK, "bo" if "wo" in name else "") for name in names)


def filled(program: Program) -> dict[str, Tensor]:
    """Write random factors into the slots; return the deltas by the weight that they are beside."""
    found = {}
    for slot in slots(program):
        down, up = program.state[slot.down], program.state[slot.up]
        down.copy_(torch.randn(down.shape) / 4)
        up.copy_(torch.randn(up.shape) / 4)
        found[slot.weight] = up @ down
    return found


@pytest.mark.parametrize("recipe", [plain("int8"), plain("fp8"), Recipe("none", None)])
def test_every_linear_gets_a_branch_that_adds_nothing(recipe):
    before = small(recipe)
    assert before.groups
    added = AddLowRank(slots(before), torch.float32)
    after = pipeline.run(before, [added])
    assert torch.equal(after(x=X), before(x=X))
    again = pipeline.run(after, [added])
    in_8_bits = [n for n in after.graph.nodes if match.is_op(n, low_rank.low_rank_down.default)]
    assert len(in_8_bits) == (2 if recipe.linears else 0)
    assert text.render(again.graph) == text.render(after.graph)


def test_what_is_written_into_a_slot_is_added():
    before = small(plain("int8"))
    after = pipeline.run(before, [AddLowRank(slots(before), torch.float32)])
    deltas = filled(after)
    weights = {w.site.path: w for group in before.groups for w in group.weights}
    wo = weights.pop("wo")
    merged = next(iter(weights.values())).data
    assert {w.data for w in weights.values()} == {merged}
    changed = {
        name: WEIGHTS[name] + deltas[merged][w.first : w.first + CHANNELS]
        for name, w in weights.items()
    }
    float_model = normal(attend, **{**WEIGHTS, **changed, "wo": WEIGHTS["wo"] + deltas[wo.data]})
    unchanged = normal(attend, **WEIGHTS)
    rounding = pipeline.relative_error(before(x=X), unchanged(x=X))
    assert pipeline.relative_error(after(x=X), float_model(x=X)) < 2 * rounding
    assert pipeline.relative_error(before(x=X), float_model(x=X)) > 20 * rounding


def lowered_on(monkeypatch, capability: tuple[int, int] | None, weights: dict) -> list[str]:
    monkeypatch.setattr(base, "capability", lambda device: capability)
    monkeypatch.setattr(base, "lacks_triton", lambda: None)
    device = CPU if capability is None else CUDA
    x = torch.randn(2, 5, 48)

    def two(self, x):
        return torch.nn.functional.linear(attend_wide(self, x), self.wo)

    def attend_wide(self, x):
        q, k, v = (torch.nn.functional.linear(x, w) for w in (self.wq, self.wk, self.wv))
        cut = (one.unflatten(-1, (3, 16)).transpose(1, 2) for one in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(*cut)
        return mixed.transpose(1, 2).flatten(2)

    program = fused(quantized(normal(two, x, **weights), plain("int8")))
    names = dict.fromkeys(w.data for group in program.groups for w in group.weights)
    added = AddLowRank(tuple(Slot(name, RANK) for name in names), torch.float32)
    after = pipeline.run(program, [added, *lowering(device)])
    return [match.target_name(n) for n in after.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), {"linear_low_rank_triton": 2, "low_rank_down_triton": 2}),
        ((8, 0), {"int8_linear_int_mm": 2, "low_rank_down_triton": 2, "aten.linear": 2}),
        (None, {"scaled_linear_low_rank": 2, "low_rank_down": 2}),
    ],
)
def test_each_device_gets_its_kernels(monkeypatch, capability, expected):
    weights = {name: torch.randn(48, 48) / 7 for name in ("wq", "wk", "wv", "wo")}
    called = lowered_on(monkeypatch, capability, weights)
    assert {one: sum(one in name for name in called) for one in expected} == expected


@pytest.mark.parametrize("recipe", [plain("int8"), Recipe("none", None)])
def test_room_is_where_the_graph_computes(recipe):
    """Not where a weight is that waits on the host, as `hoist(offload=True)` leaves them."""
    program = small(recipe)
    draft = program.draft()
    mode = draft.fake_mode
    with torch.no_grad(), mode:  # no such device is needed
        on_host = {name: mode.from_tensor(one) for name, one in program.state.items()}
        edit.retarget(draft.graph, CUDA)
        waiting = replace(program, graph=draft.graph, state=on_host)
        after = pipeline.run(waiting, [AddLowRank(slots(program), torch.float32)])
    added = after.state.keys() - on_host.keys()
    assert len(added) > 2 * (1 if recipe.linears else 3)
    assert {after.state[name].device.type for name in added} == {"cuda"}
    values = (node.meta.get("val") for node in after.graph.nodes)
    assert {one.device.type for one in values if isinstance(one, Tensor)} == {"cuda"}
