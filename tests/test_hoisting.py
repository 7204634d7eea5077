"""A compiled model computes what depends on the prompt once: the same bits, and it says so."""

from __future__ import annotations

import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from small import fused, plain, quantized
from traced import dynamic

import wancompile
from wancompile import hoist, stream
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.ir import match
from wancompile.recipe import Recipe
from wancompile.report import Report

CPU = torch.device("cpu")
FLOAT = Recipe("float", None)
# Recipe, and the linears that depend on encoder states: of the embedders, and of two blocks.
CASES = {
    "t2v": (plain("fp8"), 2 + 2 * 2),
    "i2v": (plain("int8"), 4 + 2 * 4),
    "fused_vace": (plain("int8"), 2 + 2 * 1 + 2 * 1),
    "ti2v": (FLOAT, 2 + 2 * 2),
}


def compiled(variant):
    """Return a model as `compile` makes it, without statistics, and a call of it."""
    recipe, _ = CASES[variant]
    original, kwargs, _, program = dynamic(variant)
    report = Report(recipe, (), (), (), program.nbytes, 0)
    rewritten = fused(quantized(program, recipe))
    return CompiledModel(rewritten, report, original.config, torch.float32), kwargs


@pytest.fixture(scope="module")
def i2v():
    return compiled("i2v")


@pytest.fixture
def model(i2v):
    """The model as it is after compiling, nothing kept."""
    i2v[0].hoist()
    return i2v[0]


def output(model, kwargs):
    return model(**kwargs, return_dict=False)[0]


def whole(model, kwargs):
    """Run the program that is not split."""
    return model.program(**kwargs, return_dict=False)[0]


@pytest.mark.parametrize("variant", CASES)
def test_the_same_bits_with_and_without(variant, i2v):
    _, linears = CASES[variant]
    model, kwargs = i2v if variant == "i2v" else compiled(variant)
    model.hoist()
    assert model.report.hoisting.linears == linears
    for other in (kwargs, zoo.example(variant, batch=3)):
        for step in (0.0, 1.0):  # what varies does, the second call of each prompt is a hit
            call = other | {"hidden_states": other["hidden_states"] + step}
            expected = whole(model, call)
            assert torch.equal(output(model, call), expected)
    assert (model._loop.cache.hits, model._loop.cache.misses) == (2, 2)
    model.hoist(0)
    assert model.report.hoisting is None
    assert torch.equal(output(model, call), expected)


def test_8_bit_attention_computes_the_same_bits():
    model, kwargs = zoo.make("t2v", 1)
    made = wancompile.compile(model, [kwargs], "int8-attention", limits=None)
    first, second = (output(made, kwargs) for _ in range(2))
    assert made._loop.cache.hits == 1
    assert torch.equal(first, whole(made, kwargs))
    assert torch.equal(second, first)


def test_a_pipeline_computes_each_prompt_once():
    model, _ = compiled("t2v")
    draw = torch.Generator().manual_seed(0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model
    )
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        prompt_embeds=torch.randn(1, 512, 40, generator=draw),
        negative_prompt_embeds=torch.zeros(1, 512, 40),
        latents=torch.randn(1, 16, 1, 4, 6, generator=draw),
        num_frames=1,
        height=32,
        width=48,
        num_inference_steps=4,
        output_type="latent",
    ).frames
    assert torch.isfinite(frames).all()
    assert (model._loop.cache.hits, model._loop.cache.misses) == (2 * 3, 2)


def test_a_prompt_that_is_written_to_is_computed_anew(model, i2v):
    kwargs = dict(i2v[1], encoder_hidden_states=i2v[1]["encoder_hidden_states"].clone())
    before = output(model, kwargs)
    kwargs["encoder_hidden_states"].mul_(2)
    after = output(model, kwargs)
    assert not torch.equal(before, after)
    assert torch.equal(after, whole(model, kwargs))
    kwargs["encoder_hidden_states_image"] = kwargs["encoder_hidden_states_image"] + 1
    assert torch.equal(output(model, kwargs), whole(model, kwargs))
    assert model._loop.cache.hits == 0


def test_two_prompts_take_turns(model, i2v):
    one, other = i2v[1], zoo.example("i2v")
    expected = [whole(model, call) for call in (one, other)]
    for _ in range(3):
        for call, wanted in zip((one, other), expected, strict=True):
            assert torch.equal(output(model, call), wanted)
    assert (model._loop.cache.hits, model._loop.cache.misses) == (4, 2)
    model.hoist(1)
    for call, wanted in zip((one, other) * 2, expected * 2, strict=True):
        assert torch.equal(output(model, call), wanted)
    assert (model._loop.cache.hits, model._loop.cache.misses) == (0, 4)


def test_what_is_hoisted_does_not_run_again(model, i2v, monkeypatch):
    """Counted from outside: 8-bit products of a call."""
    calls = []
    body = model._loop.body
    run = body.forward
    monkeypatch.setattr(body, "forward", lambda *args: calls.append(len(args)) or run(*args))
    output(model, i2v[1])
    op = torch.ops.wancompile.scaled_linear.default
    text_and_image = 2 * 2  # products of merged keys and values
    every = len(match.nodes_of(model.program.graph, op))
    assert len(match.nodes_of(body.graph, op)) == every - text_and_image
    assert calls == [4 + 2 * 4]  # inputs, and a key and a value for text and image of two blocks


def test_the_report_tells_what_is_kept(model, i2v):
    hoisting = model.report.hoisting
    assert hoisting.inputs == ("encoder_hidden_states", "encoder_hidden_states_image")
    parts = hoist.split(model.program, hoist.find(model.program).inputs)
    assert hoisting.weight_bytes == parts.prologue.nbytes == model.nbytes - parts.body.nbytes
    output(model, i2v[1])
    assert hoisting.cached_bytes == model._loop.cache.nbytes
    assert (hoisting.prompts, hoisting.moved_bytes) == (2, 0)
    assert "once for each prompt (encoder_hidden_states, " in str(model.report)
    data = model.report.to_data()
    assert type(model.report).from_data(data).hoisting == hoisting


def test_other_inputs_may_be_said_to_stay(model, i2v):
    model.hoist(inputs=["encoder_hidden_states_image"])
    assert model.report.hoisting.linears == 2 + 2 * 2
    assert torch.equal(output(model, i2v[1]), whole(model, i2v[1]))
    before = model.program
    with pytest.raises(InputError, match="no input 'prompt'"):
        model.hoist(inputs=["prompt"])
    with pytest.raises(InputError, match="-1"):
        model.hoist(-1)
    assert model.program is before
    assert model.report.hoisting.linears == 2 + 2 * 2


def test_a_saved_model_hoists_again(model, i2v, tmp_path):
    expected = output(model, i2v[1])
    model.save(tmp_path / "saved")
    loaded = wancompile.load(tmp_path / "saved")
    assert loaded.report.hoisting == model.report.hoisting
    assert torch.equal(output(loaded, i2v[1]), expected)
    assert torch.equal(output(loaded, i2v[1]), expected)
    assert loaded._loop.cache.hits == 1


def test_it_can_be_checked(model, i2v):
    assert model.check(i2v[1]).passed


def test_weights_of_the_prologue_come_and_go(model, i2v, monkeypatch):
    """As on a GPU, but that both places are the same one."""
    monkeypatch.setattr(stream, "_SMALL", 64)
    found = hoist.find(model.program)
    moved = hoist.to_host(model.program, found.weights, CPU)
    program = hoist.holding(model.program, moved)
    assert program.nbytes == model.nbytes
    loop = hoist.Loop(hoist.split(program, found.inputs), 2, CPU, away=True)
    tensors = program.signature.bind((), i2v[1])
    for _ in range(2):
        assert torch.equal(loop(*tensors)[0], whole(model, i2v[1]))
    assert loop.cache.hits == 1
    gain = loop.described(hoist.facts(program, found))
    small = sum(one.nbytes for one in moved.values() if one.nbytes <= 64)
    assert gain.moved_bytes == gain.weight_bytes - small > gain.weight_bytes / 2
    assert f"{gain.moved_bytes / 1000:.1f} kB of them on the host" in str(gain)
    assert 0 < loop._prologue.peak <= gain.moved_bytes


def test_on_a_cpu_there_is_nothing_to_offload(model, i2v):
    model.hoist(offload=True)
    assert not model._loop.away
    assert model.report.hoisting.moved_bytes == 0
    assert torch.equal(output(model, i2v[1]), whole(model, i2v[1]))


def test_moving_forgets_the_prompts(model, i2v):
    moved = CompiledModel(model._fused, model.report, None, model.dtype)
    output(moved, i2v[1])
    assert len(moved._loop.cache) == 1
    moved.to("meta")
    assert not len(moved._loop.cache)
    assert moved.report.hoisting == model.report.hoisting
