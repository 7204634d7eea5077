"""What experts of a pipeline are calibrated on, and what is refused before they are compiled."""

from __future__ import annotations

import pipes
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import zoo
from driven import Unchanged, asked, original
from torch import Tensor, nn

import wancompile
from wancompile import PipelineError, Stats
from wancompile.errors import CalibrationError, InputError, NumericsError
from wancompile.samples import Sample


def same_stats(one: Stats, other: Stats) -> bool:
    channels = all(
        torch.equal(getattr(mine, part), getattr(other.channels[site], part))
        for site, mine in one.channels.items()
        for part in ("amax", "count", "sample", "priority")
    )
    heads = all(
        torch.equal(getattr(mine, part), getattr(other.heads[key], part))
        for key, mine in one.heads.items()
        for part in ("low", "high")
    )
    facts = ("edges", "calls", "tally", "timesteps", "model")
    return channels and heads and all(getattr(one, f) == getattr(other, f) for f in facts)


# Data ------------------------------------------------------------------------------------------


def test_experts_of_a_pipeline_learn_what_they_learn_alone():
    """A hand-made loop: every call of each expert kept, and that expert calibrated on them."""
    pipe = original("t2v22")
    pipes.run(pipe, asked("t2v22", seed=4))  # what diffusers hangs on a model that it runs is there
    before = Unchanged(pipe)
    found = wancompile.calibrate(pipe, [asked("t2v22", seed=5)])
    before.check()
    heard: dict[str, list[Sample]] = {"transformer": [], "transformer_2": []}
    handles = [_keep(getattr(pipe, name), calls) for name, calls in heard.items()]
    pipes.run(pipe, asked("t2v22", seed=5))
    for handle in handles:
        handle.remove()
    assert [len(calls) for calls in heard.values()] == [2, 4]
    alone = wancompile.calibrate(pipe, {name: iter(calls) for name, calls in heard.items()})
    assert found.keys() == alone.keys() == heard.keys()
    assert all(same_stats(found[name], alone[name]) for name in heard)
    assert found["transformer"].model != found["transformer_2"].model
    assert not same_stats(found["transformer"], found["transformer_2"])


def _keep(model: nn.Module, calls: list[Sample]) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args
        kind = ("cond", "uncond")[len(calls) % 2]
        calls.append(Sample({**kwargs, "hidden_states": kwargs["hidden_states"].clone()}, kind))

    return model.register_forward_pre_hook(keep, with_kwargs=True)


def test_a_callable_is_heard_as_a_list_is(tmp_path):
    pipe = pipes.make("v2v")
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "strength": 1.0}
    samples = [{"prompt": one, "video": pipes.frames(5, 0), **size} for one in pipes.PROMPTS[:2]]

    def play() -> None:
        for seed, sample in enumerate(samples):
            pipe(**sample, generator=torch.Generator().manual_seed(seed), output_type="latent")

    listed = wancompile.calibrate(pipe, samples, checkpoint=tmp_path / "calib.st")
    assert [path.name for path in tmp_path.iterdir()] == ["calib.transformer.st"]
    assert same_stats(Stats.load(tmp_path / "calib.transformer.st"), listed["transformer"])
    fresh = wancompile.calibrate(pipe, play)
    assert fresh["transformer"].calls == 8
    assert same_stats(fresh["transformer"], listed["transformer"])


class Bare:
    """A pipeline by another hand: its own names, and nothing that it need not have."""

    def __init__(self, **components: Any) -> None:
        self.components = components
        self.__dict__.update(components)
        self.runs: list[dict[str, Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in getattr(self, "components", {}):
            self.components[name] = value

    def __call__(self, prompt: str, generator: Any = None, output_type: str = "np") -> None:
        self.runs.append(
            {"prompt": prompt, "seed": generator.initial_seed(), "output_type": output_type}
        )
        self.denoise(**self.call)

    def with_call(self, call: Mapping[str, Tensor]) -> Bare:
        self.call = dict(call)
        return self


def test_a_pipeline_is_known_by_what_it_has_not_by_its_class():
    model, call = zoo.make("t2v", 1)
    pipe = Bare(words=pipes.text_encoder(), pictures=pipes.vae(16), denoise=model).with_call(call)
    compiled = wancompile.compile(pipe, ["a cat", {"prompt": "a dog", "output_type": "pt"}], "fp8")
    assert list(compiled.experts) == ["denoise"]
    assert pipe.denoise is compiled.experts["denoise"]
    assert pipe.runs == [
        {"prompt": "a cat", "seed": 0, "output_type": "latent"},
        {"prompt": "a dog", "seed": 1, "output_type": "pt"},
    ]
    with pytest.raises(PipelineError, match="the pipeline's denoise is compiled already"):
        wancompile.compile(pipe, ["a cat"])


BAD_DATA = [
    ([], CalibrationError, "calibration data is empty"),
    (lambda: None, CalibrationError, "experts were never run"),
    ("a cat", InputError, "put one prompt or dict into a list"),
    ({"prompt": "a cat"}, InputError, "put one prompt or dict into a list"),
    ([{"promt": "a cat"}], InputError, "sample 0: the pipeline takes no 'promt', but prompt"),
    (["a cat", 3], InputError, "sample 1 is a int: give a prompt"),
    ({"transformer": []}, CalibrationError, "no calls for the expert transformer_2"),
    ({"transformer": [], "third": []}, InputError, "has no expert 'third', but transformer, tran"),
]


@pytest.mark.parametrize(("data", "kind", "reason"), BAD_DATA)
def test_data_that_fits_no_pipeline_is_refused(data, kind, reason):
    pipe = original("t2v22")
    before = Unchanged(pipe)
    with pytest.raises(kind, match=reason):
        wancompile.compile(pipe, data)
    before.check()


def test_what_is_neither_model_nor_pipeline_is_refused():
    for work in (wancompile.compile, wancompile.calibrate):
        with pytest.raises(InputError, match="a str is neither a model nor a pipeline"):
            work("t2v", [{}])


def test_statistics_and_examples_are_given_by_expert():
    pipe = original("t2v22")
    with pytest.raises(InputError, match="statistics of a pipeline are a dict with one entry for"):
        wancompile.compile(pipe, stats={"transformer": Stats({})})
    with pytest.raises(InputError, match="give calib_data or stats, not both"):
        wancompile.compile(pipe, ["a cat"], stats={})
    with pytest.raises(InputError, match="example inputs of a pipeline are a dict"):
        wancompile.compile(pipe, recipe="fp8", example_inputs={"hidden_states": None})


# What may go wrong -----------------------------------------------------------------------------


def test_an_expert_without_a_call_is_named_and_what_to_do():
    pipe = original("t2v22")
    before = Unchanged(pipe)
    with pytest.raises(CalibrationError) as caught:
        wancompile.compile(pipe, [asked("t2v22", num_inference_steps=1)])
    assert str(caught.value).partition("\n")[0] == (
        "the expert transformer_2 got no call: the pipeline switches experts at timestep 875 "
        "(boundary_ratio 0.875), and transformer had timesteps 999 to 999; calibrate with steps on "
        "both sides of the boundary, or take transformer_2 out of the pipeline"
    )
    before.check()


def test_an_expert_that_fails_after_another_is_named_and_the_pipeline_is_as_it_was():
    pipe = pipes.make("t2v22")
    before = Unchanged(pipe)
    _, call = zoo.make("t2v", 1)
    with torch.no_grad():
        pipe.transformer_2.blocks[0].ffn.net[2].weight[0, 0] = torch.nan
    examples = {"transformer": call, "transformer_2": call}
    with pytest.raises(NumericsError, match=r"NaN or infinity(?s:.*)\n  expert: transformer_2$"):
        wancompile.compile(pipe, recipe="fp8", example_inputs=examples, limits=None)
    before.check()


def test_a_pipeline_that_cannot_run_prompts_is_refused():
    pipe = pipes.make("t2v22")
    pipe.transformer_2 = None
    with pytest.raises(PipelineError, match=r"at timestep 875 .* but it has only transformer:"):
        wancompile.compile(pipe, ["a cat"])
    pipe.transformer = None
    with pytest.raises(PipelineError, match="WanPipeline has no part that denoises"):
        wancompile.compile(pipe, ["a cat"])


def test_a_pipeline_that_offloads_is_refused():
    pipe = pipes.make("t2v")
    pipe.vae._hf_hook = object()
    with pytest.raises(PipelineError, match=r"moves its vae by a hook.* pipe\.remove_all_hooks"):
        wancompile.compile(pipe, ["a cat"])
