"""The compiled model in the place of the one it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import clone
import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from once import Traced
from torch import Tensor, nn

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.errors import CalibrationError, InputError, RecipeError
from wancompile.ir import match
from wancompile.pipeline import relative_error
from wancompile.quant.stats import Stats
from wancompile.recipe import ATTENTIONS, QSpec, Recipe, Rule

MIXED = Recipe(
    "mixed",
    QSpec("int8"),
    (Rule("ffn_*", QSpec("fp8")), Rule("*.attn2.*", None), Rule("*.attn2.to_q", QSpec("int8"))),
    attention=ATTENTIONS["fp8"],
)
# The largest relative L2 error of the output that is allowed, per recipe.
BOUNDS: Mapping[str | Recipe, float] = {
    "int8": 0.01,
    "fp8": 0.04,
    "int8-attention": 0.02,
    "fp8-attention": 0.05,
    MIXED: 0.04,
}


def float_output(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**kwargs, return_dict=False)[0]


def output(compiled: CompiledModel, kwargs: Mapping[str, Any]) -> Tensor:
    return compiled(**kwargs, return_dict=False)[0]


class Compiled:
    """A model and what it becomes, compiled once per recipe from one calibration."""

    def __init__(self, layers: int) -> None:
        self.model, self.kwargs = zoo.make("t2v", layers)
        self.traced = Traced.on(self.model, [self.kwargs, zoo.example("t2v", layers)])
        self._made: dict[str | Recipe, CompiledModel] = {}

    def by(self, recipe: str | Recipe) -> CompiledModel:
        if recipe not in self._made:
            self._made[recipe] = self.traced.compiled(recipe)
        return self._made[recipe]


@pytest.fixture(scope="module")
def one_block() -> Compiled:
    return Compiled(layers=1)


@pytest.fixture(scope="module")
def two_blocks() -> Compiled:
    return Compiled(layers=2)


@pytest.fixture
def int8(two_blocks) -> CompiledModel:
    return two_blocks.by("int8")


@pytest.fixture
def wan(two_blocks) -> tuple[nn.Module, dict[str, Tensor]]:
    return two_blocks.model, two_blocks.kwargs


# Every recipe, every kind of model --------------------------------------------------------------


@pytest.mark.parametrize("recipe", BOUNDS, ids=lambda one: getattr(one, "name", one))
def test_every_recipe_is_close(one_block, recipe):
    other = zoo.example("t2v", batch=3, seed=5)
    expected = float_output(one_block.model, other)
    error = relative_error(output(one_block.by(recipe), other), expected)
    assert BOUNDS[recipe] / 10 < error < BOUNDS[recipe]


KINDS = [name for name in zoo.VARIANTS if name not in ("t2v", "animate")]


@pytest.mark.parametrize("variant", KINDS)
def test_every_kind_of_model_is_close(variant):
    model, kwargs = zoo.make(variant, layers=1)
    names = list(BOUNDS)[:4]
    recipe = names[KINDS.index(variant) % len(names)]
    compiled = wancompile.compile(model, [kwargs], recipe)
    other = zoo.example(variant, layers=1, batch=3, seed=5)
    error = relative_error(output(compiled, other), float_output(model, other))
    assert BOUNDS[recipe] / 10 < error < BOUNDS[recipe]
    assert compiled.nbytes < compiled.report.bytes_before


def test_a_model_by_another_hand_is_close():
    recipe = "int8-attention"
    wan, kwargs = zoo.make("i2v", layers=1)
    loom = clone.from_wan(wan, clone.Taste("einsum"))
    compiled = wancompile.compile(loom, [clone.arguments(kwargs)], recipe)
    other = zoo.example("i2v", layers=1, batch=3)
    error = relative_error(compiled(**clone.arguments(other)), float_output(wan, other))
    assert BOUNDS[recipe] / 10 < error < BOUNDS[recipe]


def test_a_mixed_recipe_is_followed(one_block):
    state = one_block.by(MIXED).program.state
    weights = {
        "attn1.to_out.0.weight_int8",
        "attn2.to_q.weight_int8",
        "attn2.to_k.weight",
        "ffn.net.0.proj.weight_fp8",
    }
    assert {f"blocks.0.{name}" for name in weights} <= set(state)
    assert "merged.blocks.0.attn1.to_q.weight_int8" in state
    assert not {f"blocks.0.attn1.{name}.weight_int8" for name in ("to_q", "to_k", "to_v")} & set(
        state
    )
    assert "blocks.0.attn1.attention_q_scale" in state


def test_text_states_are_quantised_once_per_smooth_scale(int8):
    groups = [group for group in int8.report.groups if group.role == "attn_kv_proj"]
    scales = [group.smoothing.inverse for group in groups]
    assert all(scales)
    op = torch.ops.wancompile.quantize_per_token.default
    reads = [str(node.args[1]) for node in match.nodes_of(int8.program.graph, op)]
    stored = {node.name: str(node.target) for node in int8.program.graph.find_nodes(op="get_attr")}
    assert sorted(stored[name] for name in reads if stored.get(name) in scales) == sorted(scales)


# A drop-in --------------------------------------------------------------------------------------


def pipeline_of(transformer: nn.Module) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


DRAW = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 16, 3, 6, 8, generator=DRAW)
TEXT, NO_TEXT = torch.randn(2, 512, 40, generator=DRAW), torch.zeros(2, 512, 40)
STEPS, GUIDANCE = 3, 4.0


def sampled_by_pipeline(transformer: nn.Module) -> Tensor:
    return pipeline_of(transformer)(
        prompt_embeds=TEXT,
        negative_prompt_embeds=NO_TEXT,
        latents=LATENTS,
        num_frames=4 * (LATENTS.shape[2] - 1) + 1,
        height=8 * LATENTS.shape[3],
        width=8 * LATENTS.shape[4],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).frames


def sampled_by_hand(transformer: nn.Module) -> Tensor:
    scheduler = pipeline_of(transformer).scheduler
    scheduler.set_timesteps(STEPS)
    latents = LATENTS
    for step in scheduler.timesteps:
        with_text, without = (
            transformer(latents, step.expand(2), text).sample for text in (TEXT, NO_TEXT)
        )
        guided = without + GUIDANCE * (with_text - without)
        latents = scheduler.step(guided, step, latents, return_dict=False)[0]
    return latents


def test_a_diffusers_pipeline_runs_it(wan, int8):
    video = sampled_by_pipeline(int8)
    assert video.shape == LATENTS.shape
    torch.testing.assert_close(video, sampled_by_hand(int8))
    error = relative_error(video, sampled_by_pipeline(wan[0]))
    assert 1e-4 < error < 0.05


def test_arguments_go_by_position_and_by_name(wan, int8):
    _, kwargs = wan
    order = ("hidden_states", "timestep", "encoder_hidden_states")
    assert set(order) == set(kwargs)
    by_position = int8(*(kwargs[name] for name in order), None, False)[0]
    assert torch.equal(by_position, output(int8, kwargs))
    assert torch.equal(int8(**kwargs, attention_kwargs=None).sample, by_position)


def test_results_are_wrapped_like_those_of_the_model(wan, int8):
    model, kwargs = wan
    for options in ({}, {"return_dict": True}, {"return_dict": False}):
        assert type(int8(**kwargs, **options)) is type(model(**kwargs, **options))
    assert isinstance(int8(**kwargs), Transformer2DModelOutput)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timestep": None}, "timestep is missing"),
        ({"hidden_states": torch.randn(1, 4, 3, 6, 8)}, "hidden_states has shape"),
        ({"encoder_hidden_states_image": torch.randn(1, 7, 40)}, "traced without the tensor"),
        ({"attention_kwargs": {"scale": 0.5}}, "traced without attention_kwargs"),
        ({"no_such": 1}, "forward has no parameter 'no_such'"),
    ],
)
def test_calls_that_do_not_fit_are_explained(wan, int8, change, reason):
    with pytest.raises(InputError, match=reason):
        int8(**{**wan[1], **change})


@pytest.mark.parametrize("size", [(1, 1, 2, 2), (1, 7, 4, 14), (5, 2, 16, 6)])
def test_another_size_needs_no_new_program(wan, int8, size):
    model, _ = wan
    batch, *latent = size
    program = int8.program
    call = {
        "hidden_states": torch.randn(batch, 16, *latent),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 512, 40),
    }
    assert relative_error(output(int8, call), float_output(model, call)) < 0.02
    assert int8.program is program


def test_integer_timesteps_are_numbers_too(wan, int8):
    call = {**wan[1], "timestep": torch.tensor([500, 20])}
    assert torch.equal(
        output(int8, call), output(int8, {**call, "timestep": call["timestep"] * 1.0})
    )


def test_it_tells_what_pipelines_ask(wan, int8):
    model, _ = wan
    assert int8.config is model.config
    assert (int8.dtype, int8.device) == (torch.float32, torch.device("cpu"))
    with int8.cache_context("cond"):
        pass
    assert not int8.training
    assert list(int8.parameters())  # accelerate asks the first one where the model is
    assert not any(one.requires_grad for one in int8.parameters())
    stored = {name.removeprefix("lowered.") for name in int8.state_dict()}
    left = int8.program.state.keys() - stored  # what LoRAs alone ask for, kept beside the graph
    assert all(name.endswith(("_inputs", "_outputs")) for name in left)
    assert int8.nbytes == sum(tensor.nbytes for tensor in int8.program.state.values())


def test_types_are_kept(int8):
    for change in (lambda: int8.to(torch.float16), int8.bfloat16, int8.double):
        with pytest.raises(TypeError, match="keeps its types"):
            change()
    assert int8.to(torch.float32) is int8
    assert int8.to("cpu") is int8.float().eval()


def test_it_moves(one_block):
    kwargs = one_block.kwargs
    compiled = one_block.traced.compiled("fp8")
    kept = compiled.program
    compiled.to("cpu")
    assert compiled.program is kept
    compiled.to("meta")
    assert compiled.device.type == "meta"
    assert all(tensor.is_meta for tensor in compiled.state_dict().values())
    out = output(compiled, {name: tensor.to("meta") for name, tensor in kwargs.items()})
    assert (out.device.type, out.shape) == ("meta", kwargs["hidden_states"].shape)


# The model it was made from ---------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model, kwargs = zoo.make("t2v", layers=1)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward, pointers = model.forward, {n: t.data_ptr() for n, t in model.named_parameters()}
    wancompile.compile(model, [kwargs], "int8")
    assert model.training
    assert model.forward == forward
    assert {n: t.data_ptr() for n, t in model.named_parameters()} == pointers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_consumed_model_gives_up_its_weights(one_block):
    again, kwargs = zoo.make("t2v", layers=1)
    stats = one_block.traced.prepared.stats
    compiled = wancompile.compile(
        again, recipe="int8", stats=stats, example_inputs=kwargs, consume=True
    )
    assert all(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(output(compiled, kwargs), output(one_block.by("int8"), kwargs))


def test_a_model_is_consumed_where_nothing_is_smoothed():
    """Then the smoothed program is the one before it, whose weights have to stay until rounding."""
    recipe, example = Recipe("plain", QSpec("int8", smooth=False)), zoo.example("t2v", 1)
    made = [
        wancompile.compile(zoo.make("t2v", 1)[0], recipe=recipe, example_inputs=example, consume=on)
        for on in (False, True)
    ]
    assert torch.equal(*(output(one, example) for one in made))


def test_two_compilations_give_the_same_bits():
    outputs, states = [], []
    for _ in range(2):
        model, kwargs = zoo.make("t2v", layers=1)
        compiled = wancompile.compile(model, [kwargs], "int8-attention")
        outputs.append(output(compiled, kwargs))
        states.append(compiled.state_dict())
    assert torch.equal(*outputs)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_stays_in_float_is_shared(wan, int8):
    theirs = {tensor.data_ptr() for tensor in wan[0].parameters()}
    stored = int8.program.state
    shared = {name for name, tensor in stored.items() if tensor.data_ptr() in theirs}
    assert {"patch_embedding.weight", "proj_out.weight"} <= shared
    assert all(stored[n].is_floating_point() and stored[n].itemsize == 4 for n in shared)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"recipe": "int8-attention"}, CalibrationError, "8-bit attention needs calibration data"),
        (
            {"recipe": Recipe("r", None, (Rule("blocks.7.*", None),))},
            RecipeError,
            "matches no group",
        ),
        ({"recipe": "int4"}, RecipeError, "no recipe 'int4'"),
        ({"example_inputs": None}, InputError, "example_inputs must show one call"),
        ({"calib_data": [], "stats": Stats({})}, InputError, "calib_data or stats, not both"),
    ],
)
def test_what_cannot_be_compiled_is_explained(options, error, reason):
    model, kwargs = zoo.make("t2v", layers=1)
    with pytest.raises(error, match=reason):
        wancompile.compile(model, **{"example_inputs": kwargs, **options})
