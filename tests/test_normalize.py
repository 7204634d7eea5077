"""Laws of the normalizing passes together, on whole models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import clone
import pytest
import torch
import traced
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import run_pass
from torch.fx.node import map_aggregate

import wancompile
from wancompile import pipeline, presets
from wancompile.export import export
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.passes import NORMALIZE
from wancompile.program import Program

RESIZABLE = [variant for variant in zoo.VARIANTS if variant != "animate"]
# Every spelling that passes meet in them is in one of these, too.
UNLIKE = ["t2v", "flf2v", "ti2v", "vace", "i2v_no_cross_norm", "fused_i2v"]


def in_double(program: Program) -> Program:
    """Return the program with every fp32 number in fp64: what is left is not rounding."""
    draft = program.draft()
    for node in list(draft.graph.nodes):
        if "assert" in str(node.target):
            draft.graph.erase_node(node)
            continue
        node.args = map_aggregate(node.args, widened)
        node.kwargs = map_aggregate(node.kwargs, widened)
    state = {name: doubled(tensor) for name, tensor in draft.state.items()}
    inputs = tuple(replace(spec, dtype=widened(spec.dtype)) for spec in program.signature.inputs)
    signature = replace(program.signature, inputs=inputs)
    return replace(program, graph=draft.graph, state=state, signature=signature)


def widened(value):
    return torch.float64 if value is torch.float32 else value


def doubled(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("variant", RESIZABLE)
def test_the_function_stays_to_the_last_digit(variant):
    _, _, exported, normal = traced.dynamic(variant)
    arguments = {name: doubled(t) for name, t in zoo.example(variant, batch=1).items()}
    (expected,) = in_double(exported)(**arguments)
    (actual,) = in_double(normal)(**arguments)
    assert expected.dtype == torch.float64
    assert expected.abs().mean() > 0.1
    assert pipeline.relative_error(actual, expected) < 1e-11


@cache
def exported_clone(style):
    """Return a model by another hand as it was captured, and the arguments of its call."""
    model, kwargs = zoo.make("i2v", 1)
    loom = clone.from_wan(model, clone.Taste(style, long_gelu=True))
    arguments = clone.arguments(kwargs)
    return export(loom, [arguments], dynamic=False), arguments


@pytest.mark.parametrize("style", ["matmul", "einsum", "bmm"])
def test_the_function_of_the_clone_stays_to_the_last_digit(style):
    exported, arguments = exported_clone(style)
    normal = pipeline.run(exported, NORMALIZE)
    wide = {name: doubled(tensor) for name, tensor in arguments.items()}
    assert pipeline.relative_error(in_double(normal)(**wide), in_double(exported)(**wide)) < 1e-9


@pytest.mark.parametrize("variant", UNLIKE)
def test_a_second_run_of_any_pass_changes_nothing(variant):
    program = traced.dynamic(variant)[2]
    for one in NORMALIZE:
        program = run_pass(program, one)  # runs it twice and compares


@pytest.mark.parametrize("variant", RESIZABLE)
def test_normalizing_what_is_normal_changes_nothing(variant):
    normal = traced.dynamic(variant)[-1]
    again = pipeline.run(replace(normal, level=Level.EXPORTED), NORMALIZE)
    assert again.print() == normal.print()
    assert again.groups == normal.groups
    assert again.ungrouped == normal.ungrouped
    assert again.attentions == normal.attentions


@pytest.mark.parametrize("style", ["matmul", "einsum", "bmm"])
def test_normalizing_the_clone_twice_changes_nothing(style):
    program, _ = exported_clone(style)
    for one in NORMALIZE:
        program = run_pass(program, one)
    again = pipeline.run(replace(program, level=Level.EXPORTED), NORMALIZE)
    assert again.print() == program.print()
    assert again.groups == program.groups


CONFIGS = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["t2v-1.3b", "i2v-14b", "flf2v-14b", "ti2v-5b", "vace-1.3b"]),
        "layers": st.integers(1, 3),
        "heads": st.integers(1, 4),
        "head_dim": st.sampled_from([12, 16, 24]),
        "ffn_dim": st.sampled_from([16, 48]),
        "cross_norm": st.booleans(),
        "fused": st.booleans(),
        "batch": st.integers(1, 3),
        "latent": st.sampled_from([(1, 4, 4), (2, 2, 6), (3, 4, 2)]),
    }
)


def small(preset, layers, heads, head_dim, ffn_dim, cross_norm, **_):
    tiny = presets.tiny(presets.find(preset))
    changes = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": ffn_dim,
        "cross_attn_norm": cross_norm,
    }
    if "vace_layers" in tiny.config:
        changes["vace_layers"] = zoo.vace_layers(layers)
    if tiny.config["image_dim"]:
        changes["added_kv_proj_dim"] = heads * head_dim
    return presets.truncated(replace(tiny, config={**tiny.config, **changes}), layers)


@settings(max_examples=12, deadline=None)
@given(CONFIGS)
def test_every_linear_of_any_small_model_is_in_one_place(config):
    preset = small(**config)
    model = presets.build(preset, device="meta", dtype=torch.float32)
    if config["fused"]:
        zoo.fuse(model)
    shape = {"latent": config["latent"], "batch": config["batch"]}
    inputs = presets.example_inputs(preset, **shape, dtype=torch.float32)
    program = wancompile.trace(model, inputs, dynamic=False)
    members = [member for group in program.groups for member in group.members]
    listed = [*members, *(str(one.site) for one in program.ungrouped)]
    linears = [str(match.site(n)) for n in program.graph.nodes if match.is_float_linear(n)]
    assert Counter(listed) == Counter(linears)
    assert len(set(linears)) == len(linears)
    blocks = config["layers"] + len(preset.config.get("vace_layers", ()))
    per_block = {"attn_qkv_proj": 1, "attn_q_proj": 1, "attn_kv_proj": 1, "attn_out_proj": 2}
    per_block |= {"ffn_up_proj": 1, "ffn_down_proj": 1}
    if preset.config["image_dim"]:
        per_block["attn_add_kv_proj"] = 1
    roles = Counter(str(group.role) for group in program.groups)
    assert roles == {role: count * blocks for role, count in per_block.items()}
    assert (
        len(program.attentions)
        == roles["attn_qkv_proj"] + roles["attn_kv_proj"] + roles["attn_add_kv_proj"]
    )
