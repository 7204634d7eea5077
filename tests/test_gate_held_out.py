"""Calls that are kept from calibration for the gate: which, and that nothing learns from them."""

from __future__ import annotations

import itertools

import gating
import pytest
import torch
import zoo
from diffusers import UniPCMultistepScheduler, WanPipeline
from gating import OPEN, calls, float_output

import wancompile
from wancompile.gate.evidence import FIRST, MOST, HoldBack
from wancompile.pipeline import relative_error

wan = pytest.fixture(scope="module")(gating.wan)
data = pytest.fixture(scope="module")(gating.data)
traced = pytest.fixture(scope="module")(gating.traced)

LABELS = ("cond", "uncond")


class Observed:
    """Stands in for a calibration."""

    def __init__(self):
        self.seen, self.sums, self.passed_over = [], [], 0

    def observe(self, call, label):
        self.seen.append((int(call["timestep"][0]), label))
        self.sums.append(float(call["hidden_states"].sum()))
        return "observed"


def numbered(call, number):
    return {**call, "timestep": torch.full_like(call["timestep"], number)}


def test_some_calls_are_kept_from_the_observer(wan, traced, data):
    observed = Observed()
    hold = HoldBack(observed, traced.program)
    outputs = [hold(numbered(data[0], at), LABELS[at % 2]) for at in range(50)]
    held = [at for at, out in enumerate(outputs) if out != "observed"]
    assert held == [3, 12, 21, 30]  # with and without the prompt in turn
    assert [at for at, _ in observed.seen] == [at for at in range(50) if at not in held]
    assert all(label == LABELS[at % 2] for at, label in observed.seen)
    assert observed.passed_over == hold.held == MOST
    evidence = hold.evidence()
    assert evidence.held_out
    for at, call, reference in zip(held, evidence.calls, evidence.references, strict=True):
        expected = float_output(wan, numbered(data[0], at))
        assert int(call["timestep"][0]) == at
        assert relative_error(outputs[at][0], expected) < 1e-5
        assert relative_error(reference.output[0], expected) < 1e-5


def test_calls_deeper_in_the_schedule_take_the_places_of_others(wan, data):
    program = wancompile.trace(wan, data[0])
    observed = Observed()
    hold = HoldBack(observed, program)
    schedule = [1000 - 10 * step for step in range(50)]
    steps = [step for step in schedule for _ in range(2)]
    for number in (*steps, *steps):
        hold(numbered(data[0], number), "")
    kept = [int(call["timestep"][0]) for call in hold.evidence().calls]
    assert len(kept) == len(hold.evidence().references) == MOST
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == schedule[1]
    assert kept[-1] <= schedule[46]
    assert max(a - b for a, b in itertools.pairwise(kept)) < 250, "they are spread"
    assert observed.passed_over + len(observed.seen) == 200
    assert observed.passed_over <= 13


@pytest.mark.parametrize(
    ("steps", "kept"), [(3, [3]), (4, [3, 7]), (6, [3, 10]), (8, [3, 12, 14]), (10, [3, 12, 18])]
)
def test_of_a_short_schedule_a_call_of_the_last_step_is_kept(wan, data, steps, kept):
    """Two calls a step, one run: whatever is not kept is observed once, as it was."""
    program, observed = wancompile.trace(wan, data[0]), Observed()
    hold = HoldBack(observed, program)
    noise = torch.Generator().manual_seed(7)
    inputs = torch.randn(2 * steps, *data[0]["hidden_states"].shape, generator=noise)
    expected = [(1000 - 90 * (at // 2), LABELS[at % 2]) for at in range(2 * steps)]
    for (number, label), values in zip(expected, inputs, strict=True):
        call = {**numbered(data[0], number), "hidden_states": values.clone()}
        hold(call, label)
        call["hidden_states"].zero_()  # as whoever made it may do afterwards
    held = hold.evidence()
    assert len(held.calls) == observed.passed_over == hold.held <= max(1, steps / 2)
    for at, call, reference in zip(kept, held.calls, held.references, strict=True):
        assert int(call["timestep"][0]) == expected[at][0]
        assert torch.equal(call["hidden_states"], inputs[at])
        assert relative_error(reference.output[0], float_output(wan, call)) < 1e-5
    others = [at for at in range(2 * steps) if at not in kept]
    assert sorted(observed.seen) == sorted(expected[at] for at in others)
    assert sorted(observed.sums) == pytest.approx(sorted(float(inputs[at].sum()) for at in others))


def test_a_kept_call_does_not_change_with_the_callers_tensors(traced, data):
    hold = HoldBack(Observed(), traced.program)
    call = {name: tensor.clone() for name, tensor in data[0].items()}
    for _ in range(FIRST + 1):
        hold(call)
    call["hidden_states"].zero_()
    (kept,) = hold.evidence().calls
    assert torch.equal(kept["hidden_states"], data[0]["hidden_states"])


def test_what_is_held_out_is_not_in_the_statistics():
    model, data = zoo.make("t2v", 1)[0], calls(4, layers=1)
    loud = [*data[:3], {**data[3], "hidden_states": 50 * data[3]["hidden_states"]}]
    gated = wancompile.compile(model, loud, "int8-attention", limits=OPEN)
    again = wancompile.compile(model, data[:3], "int8-attention", limits=OPEN)
    (scale,) = (name for name in again.program.state if name.endswith("attention_k_scale"))
    assert torch.equal(gated.program.state[scale], again.program.state[scale])
    assert (gated.report.gate.check.held_out, again.report.gate.check.held_out) == (True, False)


def test_a_pipeline_is_calibrated_and_held_out_as_it_runs(wan):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=wan
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 512, 40, generator=torch.Generator().manual_seed(1))
    videos = []

    def play():
        videos.append(
            pipe(
                prompt_embeds=text,
                negative_prompt_embeds=torch.zeros_like(text),
                num_frames=9,
                height=48,
                width=64,
                num_inference_steps=7,
                guidance_scale=5.0,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).frames
        )

    result = wancompile.compile(wan, play)
    play()
    assert relative_error(*videos) < 1e-4  # held-back calls yield the model's own output
    check = result.report.gate.check
    assert (check.calls, check.held_out, check.passed) == (2, True, True)
    assert len({float(one["timestep"][0]) for one in result._evidence.calls}) == 2
