from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from small import WEIGHTS, X, attend, fused, normal, plain, quantized

from wancompile import pipeline
from wancompile.errors import LevelError
from wancompile.ir import match
from wancompile.ir.levels import NORMAL_OPS, Level
from wancompile.ir.site import Site, Ungrouped
from wancompile.passes import Lower
from wancompile.passes.observe import Observe

aten = torch.ops.aten


def linears(draft):
    return match.nodes_of(draft.graph, aten.linear.default)


def refused(program, spoil) -> str:
    """Spoil a copy of a program and return what the verifier says about it."""
    draft = program.draft()
    spoil(draft)
    spoilt = program.advance(draft, program.level, program.records[-1])
    with pytest.raises(LevelError) as caught:
        spoilt.verify("spoil")
    assert caught.value.pass_name == "spoil"
    return str(caught.value)


@pytest.fixture(scope="module")
def program():
    return normal(attend, **WEIGHTS)


@pytest.fixture
def at_every_level(program):
    recipe = plain("int8")
    done = quantized(program, recipe)
    merged = fused(done)
    return [
        program,
        pipeline.run(program, [Observe()]),
        done,
        merged,
        pipeline.run(merged, [Lower(torch.device("cpu"))]),
    ]


def test_good_programs_pass(at_every_level):
    for program in at_every_level:
        program.verify()
    assert [program.level.name for program in at_every_level] == [
        "NORMAL",
        "OBSERVED",
        "QUANTIZED",
        "FUSED",
        "LOWERED",
    ]


# Nodes ------------------------------------------------------------------------------------------


def test_an_unknown_op_is_named_with_its_source(program):
    def spoil(draft):
        linears(draft)[0].target = aten.relu_.default

    message = refused(program, spoil)
    assert "the op aten.relu_.default is not known at level NORMAL" in message
    assert "source: " in message
    assert "in forward" in message


@pytest.mark.parametrize("target", [torch.relu, torch.nn.functional.silu, len])
@pytest.mark.parametrize("level", Level)
def test_only_overloads_are_called(program, target, level):
    def spoil(draft):
        linears(draft)[0].target = target

    assert f"is not known at level {level.name}" in refused(replace(program, level=level), spoil)


def test_each_level_knows_its_ops_alone(at_every_level):
    normal_program, observed, done, *_ = at_every_level
    for program, level in [
        (observed, Level.NORMAL),
        (done, Level.NORMAL),
        (observed, Level.QUANTIZED),
        (done, Level.OBSERVED),
        (observed, Level.FUSED),
    ]:
        with pytest.raises(LevelError, match=f"not known at level {level.name}"):
            replace(program, level=level).verify()
    replace(normal_program, level=Level.EXPORTED).verify()


@pytest.mark.parametrize(
    ("op", "lowest"),
    [
        (torch.ops.wancompile.gelu_quantize.default, Level.FUSED),
        (torch.ops.wancompile_kernels.gelu_quantize_triton.default, Level.LOWERED),
    ],
)
def test_fused_ops_and_kernels_have_a_lowest_level(at_every_level, op, lowest):
    def spoil(draft):
        match.nodes_of(draft.graph, torch.ops.wancompile.scaled_linear.default)[0].target = op

    merged = at_every_level[3]
    below = Level(lowest - 1)
    assert f"is not known at level {below.name}" in refused(replace(merged, level=below), spoil)
    draft = merged.draft()
    spoil(draft)
    merged.advance(draft, lowest, merged.records[-1]).verify()


def test_normal_ops_write_to_nothing():
    overloads = [op for op in NORMAL_OPS if isinstance(op, torch._ops.OpOverload)]
    assert len(overloads) > 100
    assert not [op for op in overloads if op._schema.is_mutable]


@pytest.mark.parametrize("op", ["call_module", "call_method"])
def test_calls_of_modules_and_methods_are_refused(program, op):
    def spoil(draft):
        node = linears(draft)[0]
        with draft.graph.inserting_before(node):
            call = draft.graph.create_node(op, "relu", (node.args[0],))
        call.meta["val"] = match.val(node)

    assert f"{op} nodes are not allowed" in refused(program, spoil)


def test_a_missing_value_is_named(program):
    def spoil(draft):
        del linears(draft)[0].meta["val"]

    assert "linear" in refused(program, spoil).split("has no value")[0]


def test_a_missing_constant_is_named(program):
    def spoil(draft):
        del draft.state["wk"]

    assert "the graph reads wk, which has no value" in refused(program, spoil)


# Inputs -----------------------------------------------------------------------------------------


def test_a_dimension_that_was_dynamic_stays_dynamic():
    """Asking a symbolic size for its number fixes it for the whole graph."""

    def spoil(draft):
        x = next(iter(draft.graph.find_nodes(op="placeholder")))
        assert int(match.shape(x)[1]) == X.shape[1]

    message = refused(normal(attend, **WEIGHTS), spoil)
    assert f"dimension 1 of x must stay dynamic, but became {X.shape[1]}" in message


def test_an_input_of_a_fixed_shape_is_refused(program):
    def spoil(draft):
        x = next(iter(draft.graph.find_nodes(op="placeholder")))
        x.meta["val"] = torch.empty(X.shape, device="meta")

    assert "dimension 0 of x must stay dynamic, but became 2" in refused(program, spoil)


def test_an_extra_input_is_refused(program):
    def spoil(draft):
        with draft.graph.inserting_before(next(iter(draft.graph.nodes))):
            draft.graph.placeholder("y").meta["val"] = torch.empty(1, device="meta")

    assert "the graph has 2 placeholders for 1 inputs" in refused(program, spoil)


# Linears and groups -----------------------------------------------------------------------------


def in_two_groups(draft):
    draft.groups = (*draft.groups, replace(draft.groups[0], sites=(Site("wk"),)))


def grouped_and_ungrouped(draft):
    draft.ungrouped = (Ungrouped(Site("wk"), "a whim"),)


def in_no_group(draft):
    first, *rest = draft.groups
    draft.groups = (replace(first, sites=(Site("wq"), Site("wv"))), *rest)


def all_lost(draft):
    draft.groups = ()


def without_a_site(draft):
    del linears(draft)[1].meta["site"]


def with_the_site_of_another(draft):
    linears(draft)[1].meta["site"] = Site("wq")


def not_in_the_graph(draft):
    first, *rest = draft.groups
    draft.groups = (replace(first, sites=(*first.sites, Site("wx"))), *rest)


@pytest.mark.parametrize(
    ("spoil", "reason", "site"),
    [
        (in_two_groups, "a linear is in more than one group", "wk"),
        (grouped_and_ungrouped, "a linear is in more than one group", "wk"),
        (in_no_group, "a linear is in no group and has no reason", "wk"),
        (all_lost, "a linear is in no group and has no reason", "wk"),
        (with_the_site_of_another, "two linears have one site", "wq"),
        (not_in_the_graph, "a group names a linear that is not in the graph", "wx"),
    ],
)
def test_every_linear_is_in_one_group(program, spoil, reason, site):
    message = refused(program, spoil)
    assert reason in message
    assert f"site: {site}" in message


def test_a_linear_keeps_its_site(program):
    assert "linear_1 has no site" in refused(program, without_a_site)


def test_quantized_linears_count_too(program):
    assert "in no group" in refused(quantized(program, plain("fp8")), in_no_group)


def test_exported_linears_need_no_group(program):
    replace(program, groups=(), level=Level.EXPORTED).verify()


def test_shape_arithmetic_is_no_tensor_op():
    assert operator.mul in NORMAL_OPS
    assert torch.sym_max in NORMAL_OPS
    assert torch.mul not in NORMAL_OPS
