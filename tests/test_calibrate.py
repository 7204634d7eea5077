"""Calibration: what the observers learn from calls, and which statistics are kept apart."""

from __future__ import annotations

import pipes
from functools import partial

import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from test_smooth import X, normal, stream

import wancompile
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError
from wancompile.ir.site import Role
from wancompile.pipeline import relative_error
from wancompile.quant.lines import HALVES, KINDS, PER_RANGE, line_of


@pytest.fixture(scope="module")
def wan():
    """A T2V model, its inputs, and its program at level NORMAL."""
    model, kwargs = zoo.make("t2v", 1)
    return model, kwargs, wancompile.trace(model, kwargs)


@pytest.fixture(scope="module")
def per_token():
    model, kwargs = zoo.make("ti2v", 1)
    return model, kwargs, wancompile.trace(model, kwargs)


def by_range(one):
    """Rows counted in each range of timesteps, over halves and kinds of calls."""
    return one.count.view(PER_RANGE, -1).sum(0)


def label_of(program, kwargs, timestep):
    calibration = Calibration(program, labels=10)
    calibration(**{**kwargs, "timestep": timestep})
    counts = {tuple(by_range(one).bool().tolist()) for one in calibration.stats().channels.values()}
    assert len(counts) == 1
    (seen,) = counts
    assert sum(seen) == 1
    return seen.index(True)


@pytest.mark.parametrize(
    ("step", "label"),
    [(0, 0), (99.9, 0), (100, 1), (555, 5), (999, 9), (1000, 9), (1200, 9), (-3, 0)],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_statistics_go_to_the_range_of_the_timestep(wan, step, label, dtype):
    _, kwargs, program = wan
    assert label_of(program, kwargs, torch.tensor([step, step]).to(dtype)) == label


def lines_of(stats):
    """The lines that were written to, by half, kind and range; all observers agree."""
    (one, *others) = stats.channels.values()
    assert all(torch.equal(one.count.bool(), other.count.bool()) for other in others)
    assert torch.equal(one.count.bool(), torch.tensor(stats.tally).bool())
    written = one.count.view(HALVES, len(KINDS), -1).nonzero().tolist()
    return {(half, KINDS[kind], place) for half, kind, place in written}


def test_the_calls_of_a_kind_and_range_are_dealt_out_to_halves(wan):
    _, kwargs, program = wan
    calibration = Calibration(program, labels=10)
    low, high = ({**kwargs, "timestep": torch.tensor([step, step])} for step in (150.0, 950.0))
    calibration.observe(low, "cond")
    assert lines_of(calibration.stats()) == {(0, "cond", 1)}
    calibration.observe(low, "uncond")
    calibration.observe(high, "cond")
    calibration(**high)
    once = {(0, "cond", 1), (0, "uncond", 1), (0, "cond", 9), (0, "", 9)}
    assert lines_of(calibration.stats()) == once
    calibration.observe(low, "cond")
    calibration.observe(low, "cond")
    calibration.observe(high, "cond")
    stats = calibration.stats()
    assert lines_of(stats) == once | {(1, "cond", 1), (1, "cond", 9)}
    assert [stats.tally[line_of(half, 1, 1, 10)] for half in range(HALVES)] == [1, 2]
    assert [stats.calls_of(kind) for kind in KINDS] == [1, 5, 1]
    assert stats.calls == sum(stats.tally) == 7
    assert stats.timesteps == (150.0, 950.0)


def test_each_line_holds_the_maxima_of_its_calls(wan):
    _, kwargs, program = wan
    both, cond, uncond = (Calibration(program, labels=2) for _ in range(3))
    other = {**kwargs, "encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}
    for call, label, alone in ((kwargs, "cond", cond), (other, "uncond", uncond)):
        both.observe(call, label)
        alone.observe(call, label)
    together = both.stats()
    for alone in (cond, uncond):
        for site, one in alone.stats().channels.items():
            seen = one.count > 0
            assert torch.equal(together.channels[site].amax[seen], one.amax[seen])


def test_roles_say_what_reads_a_site(wan):
    _, kwargs, program = wan
    calibration = Calibration(program)
    calibration(**kwargs)
    roles = calibration.stats().roles
    assert roles == {group.observer: str(group.role) for group in program.groups}
    assert set(roles.values()) == {str(group.role) for group in program.groups}


def test_a_timestep_per_token_counts_by_its_largest(per_token):
    _, kwargs, program = per_token
    steps = torch.zeros_like(kwargs["timestep"])
    steps[:, 30:] = 740
    assert steps.dim() == 2
    assert label_of(program, kwargs, steps) == 7


def test_a_model_without_timesteps_has_one_range():
    calibration = Calibration(normal(stream), labels=4)
    calibration(x=X)
    (first, *_) = calibration.stats().channels.values()
    assert by_range(first).tolist() == [24, 0, 0, 0]
    assert calibration.stats().edges == (0.0, 250.0, 500.0, 750.0, 1000.0)


@pytest.mark.parametrize("step", [torch.inf, torch.nan])
def test_a_timestep_that_is_no_number_is_an_error_of_the_call(wan, step):
    _, kwargs, program = wan
    calibration = Calibration(program)
    with pytest.raises(CalibrationError, match="drives NaN or infinity"):
        calibration(**{**kwargs, "timestep": torch.tensor([step, 5.0])})


def test_an_overflow_names_the_first_linear_that_reads_it(wan):
    _, kwargs, program = wan
    calibration = Calibration(program)
    calibration(**kwargs)
    text = kwargs["encoder_hidden_states"] * 1e38
    with pytest.raises(CalibrationError, match="sample 1 drives NaN or infinity") as caught:
        calibration(**{**kwargs, "encoder_hidden_states": text})
    assert caught.value.site == "blocks.0.attn2.to_k"
    assert "transformer_wan.py" in caught.value.source
    assert caught.value.pass_name == "calibrate"


def test_observation_returns_what_the_model_returns(wan):
    model, kwargs, program = wan
    with torch.no_grad():
        expected = model(**kwargs, return_dict=False)[0]
    assert relative_error(Calibration(program)(**kwargs)[0], expected) < 1e-6


def test_nothing_is_learned_from_no_call(wan):
    with pytest.raises(CalibrationError, match="no call of the model was seen"):
        Calibration(wan[2]).stats()


def test_statistics_are_those_of_the_linears_inputs(wan):
    model, kwargs, program = wan
    calibration = Calibration(program, rows=64)
    calibration(**kwargs)
    stats = calibration.stats()
    for group in program.groups:
        seen = input_of(model, str(group.key), kwargs)
        one = stats.channels[group.observer]
        torch.testing.assert_close(one.amax.amax(0), seen.abs().amax(0), rtol=1e-4, atol=1e-5)
        distances = torch.cdist(one.tokens, seen).amin(1)
        assert distances.max() < 1e-3 * seen.norm(dim=1).max(), group.key


def input_of(model, name, kwargs):
    """Return the rows `[tokens, K]` that a linear reads."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(**kwargs)
    hook.remove()
    return torch.cat(seen)


def test_samples_may_differ_in_shape_and_leave_options_out(wan):
    model, kwargs, _ = wan
    other = zoo.example("t2v", 1, batch=3)
    with_none = {**other, "encoder_hidden_states_image": None, "attention_kwargs": None}
    stats = wancompile.calibrate(model, [kwargs, with_none])
    assert stats.calls == 2
    assert stats.channels.keys() == {group.observer for group in wan[2].groups}
    (first, *_) = stats.channels.values()
    tokens = sum(len(one["hidden_states"]) * one["hidden_states"][0, 0].numel() // 4
                 for one in (kwargs, other))  # fmt: skip
    assert first.count.sum() == tokens


@pytest.mark.parametrize("label", ["cond", "uncond"])
def test_padding_neither_moves_maxima_nor_crowds_the_sample(wan, label):
    """9 words and 503 rows of zeros say what 9 words and one row of zeros do."""
    _, kwargs, program = wan
    found = []
    for padding in (503, 1):
        text = kwargs["encoder_hidden_states"][:, :9]
        text = torch.cat([text, text.new_zeros(2, padding, text.shape[-1])], 1)
        call = {**kwargs, "encoder_hidden_states": text}
        calibration = Calibration(wancompile.trace(wan[0], call))
        calibration.observe(call, label)
        found.append(calibration.stats())
    (group,) = [one for one in program.groups if one.role is Role.ATTN_KV]
    padded, short = (stats.channels[group.observer] for stats in found)
    torch.testing.assert_close(padded.amax, short.amax)
    assert padded.count.sum() == 2 * 10
    assert len(padded.tokens) == 2 * 10
    assert found[0].calls_of(label) == 1
    assert (torch.cdist(padded.tokens, short.tokens).amin(1) < 1e-4).all()


def pipeline_of(model, **options):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model,
        **options,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def play():
        return pipe(
            prompt_embeds=torch.randn(1, 512, 40, generator=torch.Generator().manual_seed(1)),
            negative_prompt_embeds=torch.zeros(1, 512, 40),
            num_frames=9,
            height=48,
            width=64,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    return play


def test_a_diffusers_pipeline_is_calibration_data(wan):
    model, *_ = wan
    play = pipeline_of(model)
    latents = []
    stats = wancompile.calibrate(model, lambda: latents.append(play()))
    assert stats.calls == 8  # four steps, each with and without the prompt
    assert [stats.calls_of(kind) for kind in KINDS] == [0, 4, 4]
    (first, *_) = stats.channels.values()
    assert int(by_range(first).bool().sum()) > 1
    # The float program computes what the model does, so calibration draws the same video.
    assert latents[0].shape == (1, 16, 3, 6, 8)
    assert relative_error(latents[0], play()) < 1e-4


def test_each_expert_is_calibrated_on_its_own_timesteps():
    high, low = (zoo.make("t2v", 1, seed=seed)[0] for seed in (0, 1))
    play = pipeline_of(high, transformer_2=low, boundary_ratio=0.875)
    first = wancompile.calibrate(high, play, seed=0)
    second = wancompile.calibrate(low, play, seed=1)
    assert first.calls + second.calls == 8
    assert second.timesteps[1] < 875 <= first.timesteps[0] <= first.timesteps[1] <= 1000
    with pytest.raises(CalibrationError, match=r"different models .* their weights differ"):
        first.merge(second)
    again = wancompile.calibrate(high, play, seed=2)
    merged = first.merge(again)
    assert merged.timesteps == first.timesteps
    assert merged.calls_of("cond") == 2 * first.calls_of("cond") > 0


def test_the_bar_of_compile_knows_the_time_left_when_told_the_calls(capsys):
    model, call = zoo.make("t2v", 1)
    wancompile.compile(
        model, lambda: [model(**call) for _ in range(2)], limits=None, total=2, progress=True
    )
    assert "2/2" in capsys.readouterr().err
    pipe = pipes.make("t2v")
    runs = partial(pipe.transformer, **call)
    wancompile.compile(pipe, lambda: [runs(), runs()], "fp8", limits=None, total=2, progress=True)
    assert "2/2" in capsys.readouterr().err
