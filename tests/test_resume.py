"""A calibration that was stopped goes on, counts nothing twice, and refuses what is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import zoo
from test_smooth import normal, stream

import wancompile
from wancompile.calibrate import Calibration
from wancompile.digest import of_call
from wancompile.errors import CalibrationError, InputError
from wancompile.quant.stats import Stats
from wancompile.resume import Resumable

OPTIONS = {"labels": 4, "rows": 8, "seed": 3}


def calls(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(2, 5, 8, generator=generator)} for _ in range(count)]


def begin(path, *, live=False, weights=None, **options):
    calibration = Calibration(normal(stream, **(weights or {})), undo=True, **OPTIONS | options)
    return Resumable(calibration, path, OPTIONS | options, live=live)


def run(path, data, **options):
    """Observe all of `data` at once, as one run that nothing stops."""
    run = begin(path, **options)
    outputs = [run(call, "") for call in data]
    run.keep()
    run.finish()
    return Stats.load(path), outputs


def same(a: Stats, b: Stats):
    """Whether two statistics are the same in every bit."""
    facts = ("edges", "calls", "seeds", "tally", "roles", "timesteps", "model")
    assert [getattr(a, one) for one in facts] == [getattr(b, one) for one in facts]
    assert a.channels.keys() == b.channels.keys()
    assert a.heads.keys() == b.heads.keys()
    pairs = [(a.channels[key], b.channels[key]) for key in a.channels]
    pairs += [(a.heads[key], b.heads[key]) for key in a.heads]
    return all(
        torch.equal(getattr(x, name), getattr(y, name)) for x, y in pairs for name in vars(x)
    )


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("live", [False, True])
def test_two_runs_learn_what_one_does(tmp_path, stop, live):
    whole, expected = run(tmp_path / "whole", calls(), live=live)
    first = begin(tmp_path / "parts", live=live)
    for call in calls()[:stop]:
        first(call, "")
    first.keep()
    parts, outputs = run(tmp_path / "parts", calls(), live=live)
    assert same(whole, parts)
    assert whole.calls == 6
    for index, (one, other) in enumerate(zip(expected, outputs, strict=True)):
        if index < stop and not live:
            assert other is None  # nobody reads it, so nothing ran
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1, 3])
def test_timesteps_may_be_expanded_as_pipelines_do(size):
    call = {"timestep": torch.tensor(7).expand(size)}
    plain = {"timestep": torch.full((size,), 7)}
    assert of_call(call, "", values=True) == of_call(plain, "", values=True)
    assert of_call({"timestep": plain["timestep"] + 1}, "", values=True) != of_call(
        plain, "", values=True
    )


def test_more_data_may_come_later(tmp_path):
    run(tmp_path / "file", calls(2))
    longer, _ = run(tmp_path / "file", calls(4))
    assert same(longer, run(tmp_path / "whole", calls(4))[0])


def test_a_finished_run_costs_nothing(tmp_path):
    run(tmp_path / "file", calls())
    again = begin(tmp_path / "file")
    again._calibration._run = None  # would fail if anything ran
    for call in calls():
        again(call, "")
    written = (tmp_path / "file").stat().st_mtime_ns
    again.keep()
    assert (tmp_path / "file").stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_half_a_call_does_not_count(tmp_path, kind):
    """The second observer of the second call is cut off; the first one has counted by then."""
    observers = torch.ops.wancompile.observe_channels.default
    stopped = begin(tmp_path / "file")
    stopped(calls()[0], "")
    before = stopped._calibration.stats()
    program = stopped._calibration._run
    seen = 0

    class Cut(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal seen
            if func is observers:
                seen += 1
                if seen == 2:
                    raise kind
            return func(*args, **(kwargs or {}))

    assert sum(node.target is observers for node in program.graph.nodes) > 1
    with pytest.raises(kind), Cut():
        stopped(calls()[1], "")
    assert seen == 2
    assert same(stopped._calibration.stats(), before)
    stopped.keep()
    parts, _ = run(tmp_path / "file", calls())
    assert same(parts, run(tmp_path / "whole", calls())[0])


def test_a_call_of_nan_leaves_no_trace(tmp_path):
    run = begin(tmp_path / "file")
    run(calls()[0], "")
    before = run._calibration.stats()
    with pytest.raises(CalibrationError, match="sample 1 drives NaN or infinity"):
        run({"x": calls()[1]["x"] * torch.inf}, "")
    assert same(run._calibration.stats(), before)


# What is refused -----------------------------------------------------------------------------


def test_other_data_is_refused(tmp_path):
    run(tmp_path / "file", calls(3))
    changed = calls(3)
    changed[1] = {"x": changed[1]["x"] + 1e-3}
    with pytest.raises(CalibrationError, match=r"sample 1 is not the one that .*file counts"):
        run(tmp_path / "file", changed)


def test_another_kind_of_call_is_other_data(tmp_path):
    run(tmp_path / "file", calls(1))
    with pytest.raises(CalibrationError, match="sample 0 is not the one"):
        begin(tmp_path / "file")(calls(1)[0], "cond")


def test_what_a_pipeline_computes_may_differ_by_rounding(tmp_path):
    run(tmp_path / "file", calls(2), live=True)
    changed = calls(2)
    changed[1] = {"x": changed[1]["x"] + 1e-6}
    run(tmp_path / "file", changed, live=True)
    changed[0] = {"x": changed[0]["x"] + 1e-6}  # made by its seed alone
    with pytest.raises(CalibrationError, match="sample 0 is not the one"):
        run(tmp_path / "file", changed, live=True)
    other_shape = [calls(2)[0], {"x": calls(2)[1]["x"][:, :3]}]
    with pytest.raises(CalibrationError, match="sample 1 is not the one"):
        run(tmp_path / "file", other_shape, live=True)


def test_less_data_is_refused(tmp_path):
    run(tmp_path / "file", calls(3))
    with pytest.raises(CalibrationError, match="counts 3 calls, and the data has only 2"):
        run(tmp_path / "file", calls(2))


@pytest.mark.parametrize("option", ["labels", "rows", "seed"])
def test_other_options_are_refused(tmp_path, option):
    run(tmp_path / "file", calls(1))
    old, new = OPTIONS[option], OPTIONS[option] + 1
    with pytest.raises(CalibrationError, match=f"made with {option} = {old}, not {new}"):
        begin(tmp_path / "file", **{option: new})


def test_a_list_does_not_go_on_from_a_callable(tmp_path):
    run(tmp_path / "file", calls(1), live=True)
    with pytest.raises(CalibrationError, match="made with a callable = True, not False"):
        begin(tmp_path / "file")


def test_another_model_is_refused(tmp_path):
    from test_smooth import tensors

    run(tmp_path / "file", calls(1))
    weights = tensors()
    weights["wo"] = weights["wo"] * 1.01
    with pytest.raises(CalibrationError, match="file is the checkpoint of another model"):
        begin(tmp_path / "file", weights=weights)


def test_statistics_are_no_checkpoint(tmp_path):
    stats, _ = run(tmp_path / "file", calls(1))
    stats.save(tmp_path / "stats")
    with pytest.raises(CalibrationError, match="is no checkpoint to go on from"):
        begin(tmp_path / "stats")


def test_a_broken_file_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        begin(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"broken"


def test_a_missing_folder_is_named_before_anything_runs(tmp_path):
    with pytest.raises(CalibrationError, match=r"there is no folder .*absent"):
        begin(tmp_path / "absent" / "file")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    old, _ = run(tmp_path / "file", calls(1))

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    again = begin(tmp_path / "file")
    again(calls(1)[0], "")
    monkeypatch.setattr("wancompile.quant.stats.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        again(calls(2)[1], "")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert same(Stats.load(tmp_path / "file"), old)


# Through the front door ------------------------------------------------------------------------


def test_a_callable_is_played_again_and_counted_once(tmp_path):
    model, kwargs = zoo.make("t2v", 1)
    steps = [{**kwargs, "timestep": torch.tensor([one, one])} for one in (900.0, 500.0, 100.0)]
    outputs = []

    def play(until=None):
        for index, call in enumerate(steps):
            if index == until:
                raise KeyboardInterrupt
            outputs.append(model(**call, return_dict=False)[0])

    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt):
        wancompile.calibrate(model, lambda: play(2), checkpoint=path)
    assert Stats.load(path).calls == 2
    resumed = wancompile.calibrate(model, play, checkpoint=path)
    whole = wancompile.calibrate(model, play, checkpoint=tmp_path / "whole")
    assert same(resumed, whole)
    assert same(resumed, Stats.load(path))
    assert torch.equal(torch.stack(outputs[:2]), torch.stack(outputs[2:4]))
    assert torch.equal(torch.stack(outputs[2:5]), torch.stack(outputs[5:]))


def test_compiling_goes_on_where_it_was_stopped(tmp_path):
    """Of five calls the fourth is held back: it is in no file, and runs again."""
    model, kwargs = zoo.make("t2v", 1)
    steps = [{**kwargs, "timestep": torch.full((2,), one)} for one in (900.0, 700.0, 500.0, 300.0)]
    steps.append(kwargs)
    path = tmp_path / "file"

    def play(until=None):
        for index, call in enumerate(steps):
            if index == until:
                raise KeyboardInterrupt
            model(**call)

    def compiled(data):
        return wancompile.compile(model, data, "int8-attention", checkpoint=path)

    with pytest.raises(KeyboardInterrupt):
        compiled(lambda: play(4))
    assert Stats.load(path).calls == 3
    resumed = compiled(play)
    assert Stats.load(path).calls == 4
    whole = wancompile.compile(model, play, "int8-attention")
    assert resumed.report.gate == whole.report.gate
    assert resumed.report.gate.check.held_out
    assert resumed._fused.state.keys() == whole._fused.state.keys()
    for name, tensor in whole._fused.state.items():
        assert torch.equal(tensor, resumed._fused.state[name]), name
    with pytest.raises(CalibrationError, match="made with held_back = True, not False"):
        wancompile.calibrate(model, play, checkpoint=path)
    with pytest.raises(InputError, match="a checkpoint is one of calibration"):
        wancompile.compile(model, example_inputs=kwargs, checkpoint=path)


SCRIPT = """
import sys, time
import torch, wancompile
from kit import Function
from test_smooth import X, stream, tensors

def data():
    for index in range(5):
        yield {"x": X + index}
        print(index, flush=True)
        time.sleep(float(sys.argv[2]))

stats = wancompile.calibrate(Function(stream, **tensors()), data(), checkpoint=sys.argv[1])
stats.save(sys.argv[1] + ".result")
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a process learns that nothing stops."""
    path = tmp_path_factory.mktemp("whole") / "stats"
    finish(path)
    return Stats.load(f"{path}.result")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on(tmp_path, undisturbed, how):
    path = tmp_path / "stats"
    killed = start(path, 2.0)
    assert killed.stdout is not None
    for _ in range(2):
        killed.stdout.readline()
    wait_for(path)
    killed.send_signal(how)
    killed.communicate()
    assert killed.returncode != 0
    counted = Stats.load(path).calls
    assert counted in (1, 2) if how == signal.SIGKILL else counted == 2
    finish(path)
    assert same(Stats.load(f"{path}.result"), undisturbed)


def finish(path):
    done = start(path, 0.0)
    _, errors = done.communicate()
    assert done.returncode == 0, errors


def start(path, pause):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(pause)],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
