from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

import wancompile
from wancompile.errors import InputError, LevelError, RecipeError
from wancompile.export import export
from wancompile.plan import Plan, plan, plan_program
from wancompile.recipe import QSpec, Recipe, Rule, resolve

HEADS, HEAD_DIM, FFN, LAYERS, TEXT, TEXT_DIM, IMAGE_DIM = 2, 16, 48, 2, 512, 24, 20
DIM = HEADS * HEAD_DIM
FRAMES, HEIGHT, WIDTH = 3, 8, 6
TOKENS = FRAMES * HEIGHT // 2 * WIDTH // 2
CHANNELS = 36


def wan(device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> WanTransformer3DModel:
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=FFN,
            num_layers=LAYERS,
            image_dim=IMAGE_DIM,
            added_kv_proj_dim=DIM,
        )
    return model.to(dtype).eval()


def call(
    batch: int = 1, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    with torch.device(device):
        return {
            "hidden_states": torch.zeros(batch, CHANNELS, FRAMES, HEIGHT, WIDTH, dtype=dtype),
            "timestep": torch.zeros(batch),
            "encoder_hidden_states": torch.zeros(batch, TEXT, TEXT_DIM, dtype=dtype),
            "encoder_hidden_states_image": torch.zeros(batch, 257, IMAGE_DIM, dtype=dtype),
        }


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(wan(), call(), "int8-attention")


def work(found: Plan) -> Mapping[str, int]:
    return {one.part: one.flops for one in found.work}


def test_flops_are_those_computed_by_hand(found: Plan) -> None:
    image = 257
    linear = 2 * DIM * DIM * LAYERS
    assert work(found) == {
        "attn_qkv_proj": 3 * TOKENS * linear,
        "attn_q_proj": TOKENS * linear,
        "attn_kv_proj": 2 * TEXT * linear,
        "attn_add_kv_proj": 2 * image * linear,
        "attn_out_proj": 2 * TOKENS * linear,
        "ffn_up_proj": 2 * TOKENS * DIM * FFN * LAYERS,
        "ffn_down_proj": 2 * TOKENS * DIM * FFN * LAYERS,
        "self-attention": 4 * TOKENS * TOKENS * DIM * LAYERS,
        "cross-attention": 4 * TOKENS * (TEXT + image) * DIM * LAYERS,
        "embedding linears": 2
        * (
            (32 * DIM + DIM * DIM + DIM * 6 * DIM)
            + TEXT * (TEXT_DIM * DIM + DIM * DIM)
            + image * (IMAGE_DIM * IMAGE_DIM + IMAGE_DIM * DIM)
        ),
        "other linears": 2 * TOKENS * DIM * 16 * 4,
        "convolution": 2 * TOKENS * DIM * CHANNELS * 4,
    }


def test_flops_agree_with_torch() -> None:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        wan()(**call(2), return_dict=False)
    assert plan(wan(), call(2)).flops == counter.get_total_flops()


def test_shares_of_work_in_8_bits(found: Plan) -> None:
    in_float = {one.part for one in found.work if not one.quantized}
    assert in_float == {"cross-attention", "embedding linears", "other linears", "convolution"}
    assert found.quantized_flops == sum(one.flops for one in found.work if one.part not in in_float)
    attention_in_float = plan(wan(), call(), "int8")
    assert work(attention_in_float) == work(found)
    assert (
        attention_in_float.quantized_flops == found.quantized_flops - work(found)["self-attention"]
    )


def test_bytes_of_a_role_before_and_after(found: Plan) -> None:
    qkv = next(one for one in found.groups if one.role == "attn_qkv_proj")
    linears = 3 * LAYERS
    assert (qkv.groups, qkv.linears) == (LAYERS, linears)
    assert qkv.bytes_before == linears * 2 * (DIM * DIM + DIM)
    assert qkv.bytes_after == linears * (DIM * DIM + 4 * DIM + 2 * DIM)


def test_bytes_of_the_model_are_those_of_the_compiled_one() -> None:
    recipe = Recipe("plain", QSpec("fp8", smooth=False))
    model, inputs = wan("cpu", torch.float32), call(2, "cpu", torch.float32)
    report = wancompile.compile(model, recipe=recipe, example_inputs=inputs).report
    planned = plan(model, inputs, recipe)
    assert (planned.bytes_before, planned.bytes_after) == (report.bytes_before, report.bytes_after)


def test_rules_split_a_role(found: Plan) -> None:
    recipe = resolve("int8").with_rules([Rule("blocks.1.ffn*", None)])
    split = [one for one in plan(wan(), call(), recipe).groups if one.role == "ffn_up_proj"]
    assert [(one.dtype, one.groups) for one in split] == [("int8", 1), (None, 1)]
    assert split[1].bytes_after == split[1].bytes_before


def test_facts(found: Plan) -> None:
    facts = found.facts
    assert (facts.tokens, facts.heads, facts.head_dim) == (TOKENS, HEADS, HEAD_DIM)
    assert (facts.self_attentions, facts.cross_attentions) == (LAYERS, 2 * LAYERS)
    assert facts.inputs[0].shape == (1, CHANNELS, FRAMES, HEIGHT, WIDTH)
    assert sum(facts.dtypes.values()) == facts.nbytes == found.bytes_before


def test_every_linear_is_accounted_for(found: Plan) -> None:
    linears = sum(isinstance(one, torch.nn.Linear) for one in wan().modules())
    listed = [site for one in found.leftovers for site in one.sites]
    assert sum(one.linears for one in found.groups) + len(listed) == linears
    assert all(one.reason for one in found.leftovers)


def test_what_is_the_same_at_every_step(found: Plan) -> None:
    """Text and image embedders, and keys and values of cross-attention, by hand."""
    steady, image, scale = found.steady, 257, 4
    assert steady is not None
    assert steady.inputs == ("encoder_hidden_states", "encoder_hidden_states_image")
    assert steady.linears == 4 + 4 * LAYERS
    keys = 2 * LAYERS * DIM * DIM
    text = TEXT_DIM * DIM + DIM * DIM
    vision = IMAGE_DIM * IMAGE_DIM + IMAGE_DIM * DIM
    assert steady.flops == 2 * (TEXT * (text + keys) + image * (vision + keys))
    norms = 2 * IMAGE_DIM + 2 * DIM + 2 * LAYERS * DIM  # of the image embedder, and of keys
    biases = 2 * DIM + IMAGE_DIM + DIM + 4 * LAYERS * DIM
    assert steady.bytes_before == 2 * (text + vision + 2 * keys + norms + biases)
    assert steady.bytes_after == steady.bytes_before - 2 * keys + 4 * LAYERS * DIM * scale
    assert steady.cached_bytes == 2 * 2 * LAYERS * DIM * (TEXT + image)


def test_planning_is_measured(found: Plan) -> None:
    assert 0 < found.seconds < 60
    assert found.peak_bytes is None or found.peak_bytes > 50e6


def test_dynamic_sizes_have_no_work() -> None:
    program = wancompile.trace(wan(), call(2))
    with pytest.raises(InputError, match="dynamic=False"):
        plan_program(program, resolve("int8"))


def test_another_level_is_refused() -> None:
    program = export(wan(), [call()], dynamic=False)
    with pytest.raises(LevelError, match="NORMAL"):
        plan_program(program, resolve("int8"))


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches no group"):
        plan(wan(), call(), resolve("int8").with_rules([Rule("transformer_blocks.*", None)]))
