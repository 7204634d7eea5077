"""Programs whose weights are elsewhere: the same results, with few weights at a time."""

from __future__ import annotations

import gc
import sys
import weakref
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import zoo
from kit import exported
from small import WEIGHTS, X, attend, normal
from torch.utils._python_dispatch import TorchDispatchMode

import wancompile
from wancompile import stream
from wancompile.errors import InputError
from wancompile.export import export
from wancompile.passes.observe import LINE, Observe
from wancompile.pipeline import run
from wancompile.stream import Stream, place

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def all_move(monkeypatch):
    """Small weights come and go, too, but for single numbers."""
    monkeypatch.setattr(stream, "_SMALL", 8)


@cache
def traced(variant):
    """Return the program of two blocks, and a call of it."""
    model, kwargs = zoo.make(variant, 2)
    return wancompile.trace(model, kwargs, dynamic=False), kwargs


def sizes(program, names=None):
    return sorted(program.state[name].nbytes for name in names or program.state)


@pytest.mark.parametrize("variant", ["t2v", "fused_i2v", "ti2v", "vace"])
@pytest.mark.parametrize("budget", [0, 1 << 14, 1 << 30])
def test_a_streamed_model_computes_the_same(all_move, variant, budget):
    program, kwargs = traced(variant)
    streamed = Stream(program, CPU, budget=budget)
    assert not streamed.state
    for _ in range(2):  # a second call begins anew
        assert torch.equal(streamed(**kwargs)[0], program(**kwargs)[0])


def test_weights_go_after_their_last_reader(all_move):
    """Eight layers of one weight each: two neighbours are there at once, never three."""
    weights = {f"w{index}": torch.randn(12, 12) for index in range(8)}

    def fn(self, x):
        for name in weights:
            x = F.linear(x, getattr(self, name))
        return x

    program = exported(fn, X, **weights)
    (one,) = set(sizes(program))
    peaks = []
    for budget in (0, one, 2 * one, 5 * one, 100 * one):
        streamed = Stream(program, CPU, budget=budget)
        assert torch.equal(streamed(x=X), program(x=X))
        peaks.append(streamed.peak // one)
    assert peaks == [1, 1, 2, 5, 8]


def test_the_peak_of_a_model_is_its_two_largest_neighbours(all_move):
    model, kwargs = zoo.make("i2v", 6)
    program = wancompile.trace(model, kwargs, dynamic=False)
    largest = sizes(program)[-2:]
    for budget in (0, sum(largest)):
        streamed = Stream(program, CPU, budget=budget)
        streamed(**kwargs)
        assert max(largest) <= streamed.peak <= sum(largest) < program.nbytes / 4


def test_no_more_is_held_than_is_counted(all_move):
    """Counted from outside: the copies of weights that are alive whenever an op runs."""
    program, kwargs = traced("t2v")
    alive: dict[int, weakref.ref] = {}
    most = 0

    def load(tensor):
        copy = tensor.clone()
        key = len(alive) + 1 + max(alive, default=0)
        alive[key] = weakref.ref(copy.untyped_storage(), lambda _: alive.pop(key))
        return stream._Coming(copy, lambda: None)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            most = max(most, sum(ref().nbytes() for ref in list(alive.values())))
            return func(*args, **(kwargs or {}))

    streamed = Stream(program, CPU, budget=0)
    streamed._weights._load = load
    with Watch():
        streamed(**kwargs)
    assert 0 < most <= streamed.peak <= sum(sizes(program)[-2:])
    gc.collect()
    assert not alive


def test_a_weight_that_is_read_twice_stays_between(all_move):
    def fn(self, x):
        return F.linear(F.linear(F.linear(x, self.wq), self.wk), self.wq)

    program = exported(fn, X, wq=WEIGHTS["wq"], wk=WEIGHTS["wk"])
    loads = []
    streamed = Stream(program, CPU, budget=0)
    load = streamed._weights._load
    streamed._weights._load = lambda tensor: loads.append(tensor) or load(tensor)
    assert torch.equal(streamed(x=X), program(x=X))
    assert len(loads) == 2


def test_everything_an_op_reads_is_on_the_device(all_move):
    """The meta device refuses to be mixed with another one, as a GPU does."""
    for variant in ("i2v", "ti2v", "animate"):
        model, kwargs = zoo.make(variant, 1)
        observed = run(wancompile.trace(model, kwargs, dynamic=False), [Observe()])
        on_meta = {name: tensor.to("meta") for name, tensor in kwargs.items()}
        (out,) = Stream(observed, META)(**on_meta)
        assert out.is_meta
        assert out.shape == observed(**kwargs)[0].shape


def test_a_model_as_it_was_exported_can_be_streamed(all_move):
    """Stores into slices and ops that name a device are there still."""
    model, kwargs = zoo.make("t2v", 1)
    program = export(model, [kwargs], dynamic=False)
    assert torch.equal(Stream(program, CPU, budget=0)(**kwargs)[0], program(**kwargs)[0])
    on_meta = {name: tensor.to("meta") for name, tensor in kwargs.items()}
    assert Stream(program, META)(**on_meta)[0].is_meta


def test_small_weights_and_what_is_written_stay(monkeypatch):
    monkeypatch.setattr(stream, "_SMALL", 48)
    program = run(normal(attend, **WEIGHTS), [Observe(labels=2, rows=4)])
    streamed = Stream(program, CPU)
    assert {name for name in streamed.state if "observers" not in name} == {"bq", "bk", "bv", "bo"}
    observers = {name for name in program.state if "observers" in name}
    assert observers < streamed.state.keys()
    before = {name: program.state[name].clone() for name in observers}
    streamed.state[LINE].fill_(3)
    streamed(x=X)
    assert all(torch.equal(program.state[name], before[name]) for name in observers)
    assert streamed.state["observers.wq.count"].tolist() == [0, 0, 0, 10, *[0] * 8]


def test_what_fails_leaves_nothing_behind(all_move):
    program = exported(lambda self, x: F.linear(x, self.wq) @ self.wk.T, X, **WEIGHTS)
    streamed = Stream(program, CPU)

    class Fail(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with pytest.raises(KeyboardInterrupt), Fail():
        streamed(x=X)
    assert not streamed._weights._here
    assert torch.equal(streamed(x=X), program(x=X))


def test_a_wrong_input_is_named():
    program = exported(lambda self, x: F.linear(x, self.wq), X, wq=WEIGHTS["wq"])
    with pytest.raises(InputError, match="x has shape"):
        Stream(program, CPU)(x=X[0])


def test_what_is_there_already_is_not_moved():
    program = normal(attend, **WEIGHTS)
    assert place(program, None) is program
    assert place(program, torch.device("cpu")) is program
    assert isinstance(place(program, META), Stream)


# Through the front door ------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch, all_move):
    """Let the CPU be two devices: programs are streamed although their weights are there."""
    made = []

    def place(program, device):
        if device is None:
            return program
        made.append(Stream(program, device, budget=0))
        return made[-1]

    for name in ("wancompile.calibrate", "wancompile.pipeline"):  # the first is a function, too
        monkeypatch.setattr(sys.modules[name], "place", place)
    return made


def test_calibration_of_a_model_that_does_not_fit(elsewhere):
    model, kwargs = zoo.make("i2v22", 2)
    expected = wancompile.calibrate(model, [kwargs])
    assert not elsewhere
    found = wancompile.calibrate(model, [kwargs], device="cpu")
    *_, observed = elsewhere
    assert 0 < observed.peak < sum(tensor.nbytes for tensor in model.parameters()) / 2
    for site, one in expected.channels.items():
        assert torch.equal(found.channels[site].amax, one.amax)
        assert torch.equal(found.channels[site].sample, one.sample)
    for key, head in expected.heads.items():
        assert torch.equal(found.heads[key].low, head.low)


def test_compiling_where_the_weights_are_not(elsewhere):
    model, kwargs = zoo.make("t2v", 1)
    expected = wancompile.compile(model, [kwargs], "int8-attention")
    found = wancompile.compile(model, [kwargs], "int8-attention", device="cpu")
    assert len(elsewhere) >= 5  # before and after normalizing and smoothing, and calibration
    assert all(one.peak for one in elsewhere)
    assert torch.equal(
        found(**kwargs, return_dict=False)[0], expected(**kwargs, return_dict=False)[0]
    )


def test_an_unknown_device_is_named():
    model, kwargs = zoo.make("t2v", 1)
    for device in ("cud", "cuda:99"):
        with pytest.raises(InputError, match=f"cannot compute on the device '{device}'"):
            wancompile.calibrate(model, [kwargs], device=device)
