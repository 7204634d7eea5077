from __future__ import annotations

import operator
from dataclasses import replace

import torch
import torch.nn.functional as F
from fusing import TYPES, called_fused
from kit import counts, error
from small import (
    CHANNELS,
    WEIGHTS,
    X,
    attend,
    heads,
    joined,
    normal,
    plain,
    quantized,
    rounded_linear,
)

from wancompile import pipeline
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Site
from wancompile.passes import MergeLinears
from wancompile.quant.numerics import quantize_weight

BF16 = torch.bfloat16
ops = torch.ops.wancompile


def before(fn=attend, dtype="int8", x=X, **weights):
    return quantized(normal(fn, x, **(weights or WEIGHTS)), plain(dtype))


def merged(program):
    return pipeline.run(program, [MergeLinears()])


def products(program) -> list[torch.fx.Node]:
    return match.nodes_of(program.graph, ops.scaled_linear.default)


def widths(program) -> list[int]:
    return [match.shape(node)[-1] for node in products(program)]


def test_q_k_and_v_become_one_product(golden):
    golden(merged(before()).print("canonical"))


def test_int8_products_keep_every_bit():
    program = before()
    after = merged(program)
    assert after.level is Level.FUSED
    assert widths(after) == [3 * CHANNELS, CHANNELS]
    assert torch.equal(after(x=X), program(x=X))
    assert error(after, lambda m, x: attend(m, x, rounded_linear("int8")), X, **WEIGHTS) < 1e-5


def test_fp8_products_keep_their_values():
    """Their sums are fp32, and a library may add up in another order where N is another."""
    program = before(dtype="fp8")
    after = merged(program)
    assert widths(after) == [3 * CHANNELS, CHANNELS]
    assert pipeline.relative_error(after(x=X), program(x=X)) < 1e-6
    assert error(after, lambda m, x: attend(m, x, rounded_linear("fp8")), X, **WEIGHTS) < 1e-5


def test_every_site_keeps_its_values():
    program = before()
    after = merged(program)
    sites = [Site(name) for name in ("wq", "wk", "wv", "wo")]
    ours, theirs = (one.values(sites, x=X) for one in (after, program))
    assert ours.keys() == theirs.keys() == set(sites)
    assert all(torch.equal(ours[site], theirs[site]) for site in sites)
    at = match.by_site(after.graph)
    assert {str(one): match.target(at[one]) for one in sites} == {
        **dict.fromkeys(("wq", "wk", "wv"), torch.ops.aten.slice.Tensor),
        "wo": ops.scaled_linear.default,
    }
    assert [one.sites for one in after.groups] == [one.sites for one in program.groups]


def test_every_weight_is_found_where_it_went():
    program = before()
    after = merged(program)
    was, now = ([w for group in one.groups for w in group.weights] for one in (program, after))
    assert [w.site.path for w in now] == [w.site.path for w in was] == ["wq", "wk", "wv", "wo"]
    assert [w.first for w in now] == [0, CHANNELS, 2 * CHANNELS, 0]
    for old, new in zip(was, now, strict=True):
        rows = slice(new.first, new.first + CHANNELS)
        assert torch.equal(after.state[new.data][rows], program.state[old.data])
        assert torch.equal(after.state[new.scale][rows], program.state[old.scale])


def test_the_originals_are_let_go():
    program = before()
    after = merged(program)
    names = {f"merged.{name}" for name in ("wq_int8", "wq_scale", "bq")}
    assert set(after.state) == names | {"wo_int8", "wo_scale", "bo"}
    assert after.nbytes == program.nbytes
    rows = [program.state[f"{name}_int8"] for name in ("wq", "wk", "wv")]
    assert torch.equal(after.state["merged.wq_int8"], torch.cat(rows))


def test_what_was_merged_is_said():
    (note,) = merged(before()).records[-1].done
    assert (note.site, note.text) == ("wq", "one product for wq, wk, wv")


def test_a_second_run_changes_nothing():
    draft = merged(before()).draft()
    nodes = len(draft.graph.nodes)
    MergeLinears().apply(draft)
    assert len(draft.graph.nodes) == nodes
    assert not draft.done


def without_biases(self, x):
    return attend(self, x, linear=lambda x, weight, bias: F.linear(x, weight))


def without_the_bias_of_k(self, x):
    def linear(x, weight, bias):
        return F.linear(x, weight, None if bias is self.bk else bias)

    return attend(self, x, linear=linear)


def test_linears_without_biases_are_merged():
    program = before(without_biases)
    after = merged(program)
    assert widths(after) == [3 * CHANNELS, CHANNELS]
    assert all(match.args(node)[4] is None for node in products(after))
    assert torch.equal(after(x=X), program(x=X))


def test_a_linear_without_a_bias_stays_beside_those_with_one():
    program = before(without_the_bias_of_k)
    after = merged(program)
    assert widths(after) == [2 * CHANNELS, CHANNELS, CHANNELS]
    assert match.site(products(after)[1]) == Site("wk")
    assert torch.equal(after(x=X), program(x=X))


def test_a_weight_that_another_input_meets_stays_for_it():
    """Linear k's weight is multiplied by something else, too."""

    def fn(self, x):
        return attend(self, x) + F.linear(attend(self, torch.tanh(x)), self.wk, self.bk)

    program = before(fn)
    after = merged(program)
    assert torch.equal(after(x=X), program(x=X))


# Linears of one's own making: `fn` calls the op by name ----------------------------------------


def own(fn, **tensors):
    """Two or three 8-bit linears of `x`, called QUANTIZED; weights `w*` int8, scales `s*`."""
    return replace(called_fused(fn, X, **tensors), level=Level.QUANTIZED)


def stored(*names, dtype="int8") -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        weight = quantize_weight(WEIGHTS[f"w{name}"], TYPES[dtype])
        found |= {f"w{name}": weight.data, f"s{name}": weight.scale}
    return found


def product(self, rounded, name, bias=None, out=torch.float32):
    q, scale = rounded
    weight, weight_scale = getattr(self, f"w{name}"), getattr(self, f"s{name}")
    return ops.scaled_linear(q, scale, weight, weight_scale, bias, out)


def test_biases_of_several_float_types_are_merged_in_the_widest():
    def fn(self, x):
        rounded = ops.quantize_per_token(x, None, torch.int8)
        return tuple(product(self, rounded, name, getattr(self, f"b{name}")) for name in "qkv")

    biases = {name: WEIGHTS[name] for name in ("bq", "bk", "bv")}
    biases["bq"], biases["bv"] = biases["bq"].to(BF16), biases["bv"].to(BF16)
    program = own(fn, **stored(*"qkv"), **biases)
    after = merged(program)
    assert widths(after) == [3 * CHANNELS]
    assert after.state["merged.bq"].dtype == torch.float32
    assert all(map(torch.equal, after(x=X), program(x=X)))


def test_half_and_bfloat16_biases_are_merged_in_fp32():
    def fn(self, x):
        rounded = ops.quantize_per_token(x, None, torch.int8)
        return tuple(product(self, rounded, name, getattr(self, f"b{name}")) for name in "qk")

    biases = {"bq": WEIGHTS["bq"].half(), "bk": WEIGHTS["bk"].to(BF16)}
    program = own(fn, **stored(*"qk"), **biases)
    after = merged(program)
    assert after.state["merged.bq"].dtype == torch.float32
    assert all(map(torch.equal, after(x=X), program(x=X)))


def test_results_of_different_types_are_not_merged():
    def fn(self, x):
        rounded = ops.quantize_per_token(x, None, torch.int8)
        types = {"q": BF16, "k": torch.float32, "v": BF16}
        return tuple(product(self, rounded, name, out=out) for name, out in types.items())

    program = own(fn, **stored(*"qkv"))
    after = merged(program)
    assert widths(after) == [2 * CHANNELS, CHANNELS]
    assert all(map(torch.equal, after(x=X), program(x=X)))


def test_inputs_of_different_8_bit_types_are_not_merged():
    """The linear of k gets an fp8 input and weight of its own."""
    draft = before().draft()
    (x,), (_, k, *_) = draft.graph.find_nodes(op="placeholder"), products(draft)
    both = draft.call(ops.quantize_per_token.default, x, None, TYPES["fp8"], before=k, like=k)
    pair = [draft.call(operator.getitem, both, i, before=k, like=k) for i in (0, 1)]
    weight = quantize_weight(WEIGHTS["wk"], TYPES["fp8"])
    weights = [
        draft.store(f"fp8_{name}", one, before=k)
        for name, one in (("weight", weight.data), ("scale", weight.scale))
    ]
    draft.replace_call(k, k.target, *pair, *weights, *k.args[4:])
    program = before()
    program = program.advance(draft, program.level, program.records[-1])
    after = merged(program)
    assert widths(after) == [2 * CHANNELS, CHANNELS, CHANNELS]
    assert torch.equal(after(x=X), program(x=X))
    assert "fp8_weight" in after.state


def test_inputs_with_different_smooth_scales_are_not_merged():
    def fn(self, x):
        plain, smooth = (ops.quantize_per_token(x, one, torch.int8) for one in (None, self.inv))
        return product(self, plain, "q"), product(self, smooth, "k")

    program = own(fn, **stored(*"qk"), inv=torch.linspace(0.5, 2, CHANNELS))
    after = merged(program)
    assert counts(after) == counts(program)


def test_a_weight_that_is_computed_stays():
    def fn(self, x):
        rounded = ops.quantize_per_token(x, None, torch.int8)
        q, scale = rounded
        computed = ops.scaled_linear(q, scale, self.wk.flip(0), self.sk, None, torch.float32)
        return product(self, rounded, "q"), computed

    program = own(fn, **stored(*"qk"))
    after = merged(program)
    assert counts(after) == counts(program)


# Groups ----------------------------------------------------------------------------------------


def test_groups_that_share_an_input_are_not_merged_with_each_other():
    """All blocks read one text; a product of all blocks would live through the whole model."""

    def fn(self, x):
        text = x.flip(1)

        def cross(x):
            k, v = F.linear(text, self.wk, self.bk), F.linear(text, self.wv, self.bv)
            mixed = F.scaled_dot_product_attention(heads(F.linear(x, self.wq)), heads(k), heads(v))
            return F.linear(joined(mixed), self.wo)

        def cross_again(x):
            k, v = F.linear(text, self.wk2, self.bk), F.linear(text, self.wv2, self.bv)
            mixed = F.scaled_dot_product_attention(heads(F.linear(x, self.wo)), heads(k), heads(v))
            return F.linear(joined(mixed), self.wq)

        return cross_again(torch.tanh(cross(x)))

    more = {"wk2": WEIGHTS["wq"] + 1, "wv2": WEIGHTS["wo"] - 1}
    program = before(fn, **WEIGHTS, **more)
    after = merged(program)
    assert widths(after).count(2 * CHANNELS) == 2
    assert max(widths(after)) == 2 * CHANNELS
    assert torch.equal(after(x=X), program(x=X))
