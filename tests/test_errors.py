"""Bad input: a clear error of the right kind, and the caller's model as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import wancompile
from wancompile.errors import (
    CalibrationError,
    DetectionError,
    ExportError,
    InputError,
    LevelError,
    NumericsError,
    RecipeError,
    WancompileError,
)
from wancompile.recipe import QSpec, Recipe, Rule


class Small(nn.Module):
    """One self-attention, a time step per element, and optional text."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.spoil = spoil

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.spoil(self.norm(x))
        q, k, v = (
            linear(y).unflatten(2, (2, 4)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = x + self.dropout(self.to_out(out)) * time[:, None, None]
        return out if text is None else out + text.mean()


def call(**changes: Any) -> dict[str, Any]:
    made = {"x": torch.randn(2, 6, 8), "time": torch.tensor([3.0, 700.0]), **changes}
    return {name: value for name, value in made.items() if value is not None}


class Plain(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(x) * time[:, None, None]


class Starred(Small):
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


def with_value(value: float, name: str = "to_v.weight") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Small()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        return model

    return make


def sorts(x: Tensor) -> Tensor:
    return torch.sort(x, dim=1).values


def fills_half(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    return out + x


def branches(x: Tensor) -> Tensor:
    return x if x.mean() > 0 else -x


def overflows(x: Tensor) -> Tensor:
    return x * 1e30 * 1e30


@dataclass(frozen=True)
class Case:
    """What is given to `compile`, and what the error must say, in its fields too (`known`)."""

    kind: type[WancompileError]
    reason: str
    data: Any = None
    model: Callable[[], nn.Module] = Small
    options: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)


NAN, INF = torch.nan, torch.inf
GOOD = [call()]
STATS = wancompile.Stats({}, calls=1, seeds=(0,))


def spoiled(value: float) -> Tensor:
    x = torch.randn(2, 6, 8)
    x[1, 2, 3] = value
    return x


def rule(pattern: str) -> Recipe:
    return Recipe("mine", QSpec("int8"), (Rule(pattern, None),))


CASES = {
    "a weight is NaN": Case(
        NumericsError, "a weight holds NaN or infinity", GOOD, with_value(NAN),
        known={"site": "to_v.weight", "pass_name": "export"},
    ),
    "a bias is infinite": Case(
        NumericsError, "a weight holds NaN or infinity", GOOD, with_value(-INF, "to_out.bias"),
        known={"site": "to_out.bias", "pass_name": "export"},
    ),
    "a sample is NaN": Case(
        CalibrationError, "sample 1: x holds NaN", [call(), call(x=spoiled(NAN))],
        known={"pass_name": "calibrate"},
    ),
    "the first sample is infinite": Case(
        CalibrationError, "sample 0: x holds NaN or infinity", [call(x=spoiled(INF))],
        known={"pass_name": "calibrate"},
    ),
    "a later sample overflows": Case(
        CalibrationError, "sample 1 drives NaN or infinity into this linear",
        [call(), call(x=torch.full((2, 6, 8), 3e38))],
        known={"pass_name": "calibrate", "site": "to_", "source": "test_errors.py"},
    ),
    "the model overflows": Case(
        NumericsError, "own output .* holds NaN or infinity", GOOD, lambda: Small(overflows),
        known={"pass_name": "detect_attention"},
    ),
    "no samples": Case(CalibrationError, "calibration data is empty", []),
    "an empty generator": Case(CalibrationError, "calibration data is empty", iter(())),
    "a callable that runs nothing": Case(
        CalibrationError, "the callable never ran the model", lambda: None
    ),
    "a wrong name": Case(
        InputError, "sample 0: forward has no parameter 'videos'; it has x, time, text",
        [{"videos": torch.ones(2)}],
    ),
    "a name too few": Case(InputError, "forward needs 'time'", [call(time=None)]),
    "no sample, but tensors": Case(InputError, "sample 0: a sample is a dict", torch.ones(2, 3)),
    "one call instead of a list": Case(InputError, "sample 0: a sample is a dict", call()),
    "another rank": Case(
        InputError, "time has 2 dimensions in sample 1, 1 in sample 0",
        [call(), call(time=torch.ones(2, 6))],
    ),
    "another rank from a generator": Case(
        InputError, "sample 1: time has shape 2x6, the program takes \\*",
        lambda: iter([call(), call(time=torch.ones(2, 6))]),
    ),
    "another width": Case(
        InputError, "sample 1: x has shape 2x6x9, the program takes \\*x6x8",
        [call(), call(x=torch.randn(2, 6, 9))],
    ),
    "another type": Case(
        InputError, "sample 1: x is torch.float64, the program takes torch.float32",
        [call(), call(x=torch.randn(2, 6, 8).double())],
    ),
    "an input more": Case(
        InputError, "sample 1 adds the tensor 'text'", [call(), call(text=torch.ones(2))]
    ),
    "an input less": Case(
        InputError, "sample 1 leaves out the tensor 'text'", [call(text=torch.ones(2)), call()]
    ),
    "a shape the model refuses": Case(
        ExportError, "cannot capture the model: .*", [call(x=torch.randn(2, 6, 9))],
        known={"source": "test_errors.py"},
    ),
    "a type the model refuses": Case(
        InputError, "cannot run on the example inputs: .*type",
        [call(x=torch.randn(2, 6, 8).double())],
    ),
    "a branch on values": Case(
        ExportError, "cannot capture the model", GOOD, lambda: Small(branches),
        known={"source": "in branches"},
    ),
    "a forward without names": Case(InputError, "a forward with \\*args", GOOD, Starred),
    "no attention": Case(
        DetectionError, "holds no attention", GOOD, Plain, known={"pass_name": "detect_attention"}
    ),
    "an unknown op": Case(
        LevelError, "aten.sort.default is not known at level NORMAL", GOOD, lambda: Small(sorts),
        known={"source": "test_errors.py", "pass_name": "choose_folds"},
    ),
    "a store that is not understood": Case(
        LevelError, "in-place stores do not fill", GOOD, lambda: Small(fills_half),
        known={"source": "test_errors.py", "pass_name": "raise_stores"},
    ),
    "a rule without a match": Case(
        RecipeError, "'\\*to_quite' matches no group; nearest are .*to_q", GOOD,
        options={"recipe": rule("*to_quite")},
    ),
    "an unknown recipe": Case(
        RecipeError, "no recipe 'in8'.*nearest: int8", GOOD, options={"recipe": "in8"}
    ),
    "data and statistics": Case(
        InputError, "calib_data or stats, not both", GOOD, options={"stats": STATS}
    ),
    "neither data nor statistics": Case(InputError, "example_inputs must show one call"),
    "statistics without a call": Case(
        InputError, "example_inputs must show one call", options={"stats": STATS}
    ),
    "statistics of another model": Case(
        CalibrationError, "they are of another model",
        options={"stats": STATS, "example_inputs": call()},
        known={"site": "to_q", "source": "test_errors.py", "pass_name": "smooth"},
    ),
    "attention without statistics": Case(
        CalibrationError, "8-bit attention needs calibration data",
        options={"recipe": "fp8-attention", "example_inputs": call()},
    ),
    "weights on the meta device": Case(
        InputError, "weights are on the meta device", GOOD, lambda: Small().to("meta")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_named_and_changes_nothing(case):
    model = mixed(case.model())
    before = snapshot(model)
    # Some cases make their data anew, others are callables that are the data.
    data = case.data() if is_factory(case.data) else case.data
    with pytest.raises(case.kind, match=case.reason) as caught:
        wancompile.compile(model, data, **case.options)
    assert type(caught.value) is case.kind
    for name, part in case.known.items():
        assert part in str(getattr(caught.value, name)), name
        assert part in str(caught.value)
    assert snapshot(model) == before


def is_factory(data: Any) -> bool:
    return callable(data) and data() is not None


def mixed(model: nn.Module) -> nn.Module:
    """Put the model in training mode but for some of its parts, and freeze one weight."""
    model.train()
    parts = list(model.children())
    parts[0].eval()
    next(parts[-1].parameters(), next(model.parameters())).requires_grad_(False)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a caller could notice."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {name: bits(tensor) for name, tensor in tensors.items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "gradients": {name: (t.requires_grad, t.grad) for name, t in tensors.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "grad mode": torch.is_grad_enabled(),
    }


def bits(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def test_good_input_compiles_and_changes_nothing():
    model = mixed(Small())
    before = snapshot(model)
    compiled = wancompile.compile(model, [call(), call(x=torch.randn(2, 9, 8))])
    assert compiled(**call()).shape == (2, 6, 8)
    assert snapshot(model) == before


def test_an_error_in_a_callable_leaves_a_real_model_as_it_was():
    model, kwargs = zoo.make("t2v", 1)
    before = snapshot(mixed(model))

    def play() -> None:
        model(**kwargs)
        model(**{**kwargs, "timestep": kwargs["timestep"] * torch.nan})

    with pytest.raises(CalibrationError, match="sample 1: timestep holds NaN"):
        wancompile.compile(model, play)
    assert snapshot(model) == before


def test_an_error_lists_what_is_known():
    error = WancompileError("it broke", site="a.b", source="f.py, line 3", pass_name="smooth")
    assert str(error) == "it broke\n  site: a.b\n  source: f.py, line 3\n  pass: smooth"
    assert str(WancompileError("it broke", pass_name="smooth")) == "it broke\n  pass: smooth"
