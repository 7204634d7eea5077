from __future__ import annotations

import pytest
import torch
import traced
import zoo
from torch import nn

import wancompile
from wancompile import pipeline
from wancompile.errors import ExportError, InputError, NumericsError
from wancompile.export import export
from wancompile.ir.levels import Level

# Faces come in batches whose number torch.export fixes, so Animate is traced for one size.
RESIZABLE = [variant for variant in zoo.VARIANTS if variant != "animate"]


def reference(model, kwargs):
    with torch.no_grad():
        return model(**kwargs, return_dict=False)[0]


def error(program, model, kwargs):
    (actual,) = program(**kwargs)
    expected = reference(model, kwargs)
    assert actual.shape == expected.shape
    return pipeline.relative_error(actual, expected)


# Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["EXPORTED", "NORMAL"])
@pytest.mark.parametrize("variant", RESIZABLE)
def test_traced_once_it_runs_at_any_size(variant, level, monkeypatch):
    model, kwargs, *programs = traced.dynamic(variant)
    program = programs[Level[level]]
    monkeypatch.setattr(torch.export, "export", None)  # nothing is captured again
    graph = program.module
    for arguments in (kwargs, zoo.example(variant, batch=1), zoo.example(variant, batch=3)):
        assert error(program, model, arguments) < 2e-6
    assert program.module is graph


@pytest.mark.parametrize("variant", RESIZABLE)
def test_which_sizes_are_open(variant):
    _, kwargs, program, _ = traced.dynamic(variant)
    shapes = {spec.name: spec.shape for spec in program.signature.inputs}
    channels = kwargs["hidden_states"].shape[1]
    assert shapes["hidden_states"] == (None, channels, None, None, None)
    assert shapes["encoder_hidden_states"] == (None, 512, 40)
    assert set(shapes["timestep"]) == {None}


@pytest.mark.parametrize(
    ("variant", "latent"),
    [
        ("t2v", (1, 2, 2)),
        ("i2v", (1, 8, 12)),
        ("ti2v", (1, 8, 12)),
        ("ti2v", (1, 2, 2)),
        ("vace", (1, 8, 12)),
    ],
)
def test_ones_in_the_example_are_no_fact_about_the_model(variant, latent):
    model, kwargs = zoo.make(variant, 1, batch=1, latent=latent)
    program = export(model, [kwargs])
    others = [zoo.example(variant, 1, batch=batch) for batch in (1, 3)]
    for arguments in (kwargs, *others):
        assert error(program, model, arguments) < 2e-6


def test_one_size_only_on_request():
    model, kwargs = zoo.make("t2v", 1)
    program = export(model, [kwargs], dynamic=False)
    assert error(program, model, kwargs) < 2e-6
    with pytest.raises(InputError, match=r"hidden_states has shape 3x16x3x12x8, .* 2x16x5x8x12"):
        program(**zoo.example("t2v", 1, batch=3))


def test_what_differs_between_samples_is_open_too():
    model, one = zoo.make("t2v", 1)
    other = zoo.example("t2v", 1, batch=1)
    third = zoo.example("t2v", 1, batch=3)
    other["encoder_hidden_states"] = other["encoder_hidden_states"][:, :77]
    third["encoder_hidden_states"] = third["encoder_hidden_states"][:, :300]
    program = export(model, [one, other])
    for arguments in (one, other, third):
        assert error(program, model, arguments) < 2e-6


def test_faces_of_one_size():
    model, kwargs = zoo.make("animate", 1)
    assert error(export(model, [kwargs], dynamic=False), model, kwargs) < 2e-6


def test_faces_of_any_size_are_captured_in_one_piece():
    """More faces than one piece takes are told with the argument that takes more of them."""
    model, kwargs = zoo.make("animate", 1, batch=1)
    assert len(kwargs["face_pixel_values"][0, 0]) > model.config.motion_encoder_batch_size
    with pytest.raises(ExportError, match=r"one piece, .* such as motion_encode_batch_size") as one:
        export(model, [kwargs])
    assert "transformer_wan_animate.py" in one.value.source
    assert error(export(model, [{**kwargs, "motion_encode_batch_size": 64}]), model, kwargs) < 2e-6


# Optional inputs ------------------------------------------------------------------------------


def test_an_optional_input_may_be_absent_or_none():
    model, kwargs = zoo.make("i2v22", 1)
    with_none = {**kwargs, "encoder_hidden_states_image": None, "attention_kwargs": None}
    absent, none = (export(model, [call], dynamic=False) for call in (kwargs, with_none))
    assert absent.print("canonical") == none.print("canonical")
    for program in (absent, none):
        for arguments in (kwargs, with_none):
            assert error(program, model, arguments) < 2e-6


def test_a_tensor_must_be_given_as_in_the_example():
    model, kwargs = zoo.make("i2v", 1)
    image = kwargs["encoder_hidden_states_image"]
    program = export(model, [kwargs], dynamic=False)
    with pytest.raises(InputError, match="encoder_hidden_states_image is missing"):
        program(**{**kwargs, "encoder_hidden_states_image": None})
    model, kwargs = zoo.make("i2v22", 1)
    program = export(model, [kwargs], dynamic=False)
    with pytest.raises(InputError, match="traced without the tensor encoder_hidden_states_image"):
        program(**kwargs, encoder_hidden_states_image=image)


def test_positional_arguments_and_nested_ones():
    _, kwargs, program, _ = traced.dynamic("t2v")
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    assert torch.equal(program(*(kwargs[name] for name in names))[0], program(**kwargs)[0])
    nested = export(Nested(), [{"parts": {"a": torch.ones(2, 3), "b": [torch.ones(2, 3)]}}])
    assert nested(parts={"a": torch.ones(4, 3), "b": [torch.full((4, 3), 2.0)]}).sum() == 36


class Nested(nn.Module):
    def forward(self, parts):
        return parts["a"] + parts["b"][0]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{}], "forward needs 'parts'"),
        ([{"parts": {}}], "hold no tensor"),
        ([{"part": torch.ones(1)}], "no parameter 'part'; it has parts"),
        (
            [{"parts": {"a": torch.ones(2)}}, {"parts": {"b": torch.ones(2)}}],
            r"sample 1 leaves out the tensor \"parts\['a'\]\"",
        ),
        (
            [{"parts": {"a": torch.ones(2)}}, {"parts": {"a": torch.ones(2, 3)}}],
            r"parts\['a'\] has 2 dimensions in sample 1, 1 in sample 0",
        ),
    ],
)
def test_examples_that_do_not_fit(calls, message):
    with pytest.raises(InputError, match=message):
        export(Nested(), calls)


# Weights and modes ----------------------------------------------------------------------------


def test_weights_may_be_on_the_meta_device():
    real = traced.dynamic("i2v")[-1]
    model, kwargs = zoo.make("i2v")
    on_meta = {name: tensor.to("meta") for name, tensor in kwargs.items()}
    program = wancompile.trace(model.to("meta"), on_meta)
    assert program.groups == real.groups
    assert program.ungrouped == real.ungrouped
    assert all(tensor.is_meta for tensor in program.state.values())
    assert program.print("canonical").replace("'meta'", "'cpu'") == real.print("canonical")


def test_the_model_is_left_as_it_was():
    model, kwargs = zoo.make("t2v", 1, latent=(1, 4, 4))
    model.train()
    model.blocks[0].attn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, [kwargs], dynamic=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dropout_of_a_model_in_training_is_not_captured():
    class Dropping(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.training)

    model = Dropping().train()
    x = torch.ones(4, 5)
    assert torch.equal(export(model, [{"x": x}])(x=x), x)
    assert model.training


class Branching(nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 0:
            return y
        return x


def test_what_cannot_be_captured_names_the_line():
    model = Branching().train()
    with pytest.raises(ExportError, match="cannot capture") as caught:
        export(model, [{"x": torch.ones(2, 3)}])
    assert "test_export.py" in caught.value.source
    assert caught.value.source.endswith("in forward")
    line = Branching.forward.__code__.co_firstlineno + 2
    assert f"line {line}," in caught.value.source
    assert model.training


def test_a_model_that_fixes_a_size_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 3, 5, 8 * 12)

    with pytest.raises(ExportError, match="dimension 2 of x must stay dynamic"):
        export(Fixed(), [{"x": torch.ones(2, 3, 5, 8, 12)}])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(value, dtype):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(3, 3, dtype=dtype), nn.Linear(3, 3, dtype=dtype)

        def forward(self, x):
            return self.bad(self.good(x))

    model = Two()
    with torch.no_grad():
        model.bad.weight[1, 2] = value
    with pytest.raises(NumericsError, match="NaN or infinity") as caught:
        export(model, [{"x": torch.ones(2, 3, dtype=dtype)}])
    assert caught.value.site == "bad.weight"


def test_the_largest_finite_weights_are_finite():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(torch.float32).max)
    export(model, [{"input": torch.ones(2, 2)}])
