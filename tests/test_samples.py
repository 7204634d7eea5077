"""Calibration data in every form: each call arrives, named, and the model is as it was."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from wancompile.errors import CalibrationError, InputError
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
