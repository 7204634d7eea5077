"""Calibration: every form of data reaches the observers, and the model is as it was afterwards."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from test_smooth import X, normal, stream
from torch import nn

import wancompile
from wancompile.calibrate import Calibration
from wancompile.errors import CalibrationError, InputError
from wancompile.ir.site import Role
from wancompile.pipeline import relative_error
from wancompile.quant.lines import HALVES, KINDS, PER_RANGE, line_of
from wancompile.samples import Sample, drive


class Small(nn.Module):
    """A model of two inputs, one of them optional."""

    def forward(self, a, b=None, return_dict=False):
        return (a if b is None else a + b,)


def begun(data, model=None, **options):
    """Drive `data`; return what `begin` was given, and every call that was run."""
    first, ran = [], []

    def begin(calls):
        first.extend(calls)
        return lambda call, label: ran.append({**call, "label": label}) or (call["a"],)

    drive(model or Small(), data, begin, **options)
    return first, ran


def values(calls):
    return [(float(call["a"]), call["b"]) for call in calls]


ONE, TWO, THREE = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
DICTS = [{"a": ONE}, {"a": TWO, "b": None}, {"b": THREE, "a": THREE}]
EXPECTED = [(1.0, None), (2.0, None), (3.0, THREE)]


@pytest.mark.parametrize(
    "data",
    [DICTS, tuple(DICTS), [(ONE,), (TWO, None), [THREE, THREE]], [DICTS[0], (TWO,), DICTS[2]]],
    ids=["list", "tuple", "positional", "mixed"],
)
def test_a_sequence_is_known_before_it_runs(data):
    first, ran = begun(data)
    assert values(first) == values(ran) == EXPECTED


def test_a_generator_runs_as_it_comes():
    drawn = []

    def data():
        for one in DICTS:
            drawn.append(one)
            yield one

    first, ran = begun(data())
    assert values(first) == EXPECTED[:1]
    assert values(ran) == EXPECTED
    assert len(drawn) == 3


def test_a_data_loader_is_calibration_data():
    rows = [{"a": torch.tensor(float(value))} for value in range(6)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    _, ran = begun(loader)
    assert [call["a"].tolist() for call in ran] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_a_callable_runs_the_model_while_we_listen():
    model = Small()
    returned = []

    def play():
        for one in DICTS:
            returned.append(model(**one))

    first, ran = begun(play, model)
    assert values(first) == EXPECTED[:1]
    assert values(ran) == EXPECTED
    assert returned == [(ONE,), (TWO,), (THREE,)]
    assert "forward" not in vars(model)


def test_the_model_runs_as_itself_while_the_program_is_made():
    model = Small()

    def begin(calls):
        assert "forward" not in vars(model)
        return lambda call, label: model.__class__.forward(model, **call)

    drive(model, lambda: model(ONE), begin)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fails", ["in the callable", "in the first call", "in the last call"])
def test_forward_is_restored_after_an_error(own, fails):
    model = Small()
    if own:  # as accelerate does
        model.forward = lambda a, b=None: (a,)
    forward = model.forward

    def play():
        model(ONE)
        model(TWO)
        if fails == "in the callable":
            raise RuntimeError("broken")

    def begin(calls):
        if fails == "in the first call":
            raise RuntimeError("broken")
        return run

    def run(call, label):
        if fails == "in the last call" and call["a"] == TWO:
            raise RuntimeError("broken")
        return (call["a"],)

    with pytest.raises(RuntimeError, match="broken"):
        drive(model, play, begin)
    assert model.forward == forward
    assert ("forward" in vars(model)) is own


def test_an_output_is_wrapped_on_request():
    model = Small()
    seen = []
    begun(lambda: seen.append(model(ONE, return_dict=True)), model)
    assert seen[0].sample is ONE


@pytest.mark.parametrize("form", ["list", "generator", "callable"])
def test_the_bar_counts_calls(form, capsys):
    model = Small()
    data = {
        "list": DICTS,
        "generator": iter(DICTS),
        "callable": lambda: [model(**one) for one in DICTS],
    }
    begun(data[form], model, progress=True)
    shown = capsys.readouterr().err
    assert "calibrate" in shown
    assert ("3/3" if form == "list" else "3call") in shown


def test_there_is_no_bar_unless_asked_for(capsys):
    begun(DICTS)
    assert capsys.readouterr().err == ""


def test_the_bar_knows_the_time_left_of_a_callable_when_told_its_calls(capsys):
    model = Small()
    begun(lambda: [model(**one) for one in DICTS], model, progress=True, total=3)
    assert "3/3" in capsys.readouterr().err
    begun(iter(DICTS), model, progress=True, total=3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("data", [[], (), iter([]), lambda: None])
def test_empty_data_is_refused(data):
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        begun(data)


BAD = [
    ({"a": ONE, "c": ONE}, InputError, "sample 1: forward has no parameter 'c'; it has a, b"),
    ((ONE, ONE, False, ONE), InputError, "sample 1: 4 positional arguments given"),
    (ONE, InputError, "sample 1: a sample is a dict .* not Tensor"),
    ({"a": ONE / 0}, CalibrationError, "sample 1: a holds NaN or infinity"),
    ({"a": ONE, "b": [TWO, ONE * torch.nan]}, CalibrationError, r"sample 1: b\[1\] holds NaN"),
]


@pytest.mark.parametrize(("sample", "kind", "message"), BAD)
@pytest.mark.parametrize("form", [list, iter])
def test_a_bad_sample_is_named_by_its_number(sample, kind, message, form):
    with pytest.raises(kind, match=message) as caught:
        begun(form([{"a": ONE}, sample]))
    assert caught.value.pass_name == "calibrate"


# Kinds of calls ---------------------------------------------------------------------------------


class Named(Small):
    """A model whose calls get names, as those of diffusers do; `names` are those it was told."""

    def __init__(self):
        super().__init__()
        self.names = []

    @contextmanager
    def cache_context(self, name, **where):
        self.names.append((name, where))
        try:
            yield
        finally:
            self.names.append("left")


def labels(ran):
    return [call["label"] for call in ran]


def test_a_sample_says_its_kind():
    data = [Sample(DICTS[0], "cond"), Sample((TWO,), label="uncond"), DICTS[2], Sample(DICTS[0])]
    _, ran = begun(data)
    assert labels(ran) == ["cond", "uncond", "", ""]
    assert [float(call["a"]) for call in ran] == [1, 2, 3, 1]


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="labelled '', 'cond', 'uncond', not 'other'"):
        Sample(DICTS[0], "other")


def test_a_callable_names_its_calls_by_the_context_of_the_cache():
    model = Named()

    def play():
        with model.cache_context("cond", step_index=3):
            model(ONE)
            with model.cache_context("uncond"):
                model(ONE)
            model(ONE)
        with model.cache_context("something else"):
            model(ONE)
        model(ONE)

    _, ran = begun(play, model)
    assert labels(ran) == ["cond", "uncond", "cond", "", ""]
    # The model's own context is entered and left as without us.
    assert model.names == [
        ("cond", {"step_index": 3}), ("uncond", {}), "left", "left", ("something else", {}), "left"
    ]  # fmt: skip
    assert "cache_context" not in vars(model)


@pytest.mark.parametrize("own", [False, True])
def test_the_context_is_put_back_after_an_error(own):
    model = Named()
    if own:
        model.cache_context = lambda name: nullcontext()
    before = vars(model).copy()

    def play():
        with model.cache_context("cond"):
            model(ONE)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        begun(play, model)
    assert vars(model) == before


def test_the_model_has_its_own_context_while_the_program_is_made():
    model = Named()

    def begin(calls):
        assert "cache_context" not in vars(model)
        return lambda call, label: (label,)

    def play():
        with model.cache_context("uncond"):
            assert model(ONE) == ("uncond",)
            assert model(ONE) == ("uncond",)

    drive(model, play, begin)


# With a program --------------------------------------------------------------------------------


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


def test_every_other_call_of_a_kind_and_range_goes_to_the_other_half(wan):
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
    assert stats.tally[line_of(0, 1, 1, 10)] == 2
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
        calibration = Calibration(
            wancompile.trace(wan[0], {**kwargs, "encoder_hidden_states": text})
        )
        calibration.observe({**kwargs, "encoder_hidden_states": text}, label)
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
    first, second = (
        wancompile.calibrate(one, play, seed=index) for index, one in enumerate((high, low))
    )
    assert first.calls + second.calls == 8
    assert second.timesteps[1] < 875 <= first.timesteps[0] <= first.timesteps[1] <= 1000
    with pytest.raises(CalibrationError, match="different models .* their weights differ"):
        first.merge(second)
    again = wancompile.calibrate(high, play, seed=2)
    merged = first.merge(again)
    assert merged.timesteps == first.timesteps
    assert merged.calls_of("cond") == 2 * first.calls_of("cond") > 0
