"""Programs on a GPU whose weights are on the host: the same results, in little memory."""

from __future__ import annotations

import pytest
import torch

import wancompile
from wancompile import presets
from wancompile.calibrate import Calibration
from wancompile.stream import Stream

MIB = 1 << 20
# Blocks of 1536 channels and 8960 in the MLP: 80 MiB of weights each in bf16.
PRESET = presets.truncated(presets.find("t2v-1.3b"), 6)


def call(device: torch.device | str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    given = presets.example_inputs(PRESET, latent=(3, 16, 16), device="cpu")
    return {name: tensor.to(device) for name, tensor in given.items()}


@pytest.fixture(scope="module")
def program() -> wancompile.Program:
    torch.manual_seed(0)
    model = presets.build(PRESET, device="cpu")
    return wancompile.trace(model, call("cpu"), dynamic=False)


@pytest.fixture(scope="module")
def there(program: wancompile.Program) -> wancompile.Program:
    return program.to(torch.device("cuda"))


@pytest.mark.parametrize("budget", [0, 96 * MIB, 1 << 30])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_streamed_program_computes_the_same(cuda, program, there, budget, pinned):
    """Again and again: a copy that comes late, or is overwritten early, shows in some run."""
    expected = there(**call(cuda))[0]
    if pinned:
        state = {name: tensor.pin_memory() for name, tensor in program.state.items()}
        program = wancompile.Program(program.graph, state, program.level, program.signature)
    streamed = Stream(program, cuda, budget=budget)
    for _ in range(5):
        assert torch.equal(streamed(**call(cuda))[0], expected)
    assert torch.equal(streamed(**call("cpu"))[0], expected.cpu())


def test_memory_stays_within_the_budget(cuda, program, there):
    def peak(run) -> int:
        given = call(cuda)
        run(**given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        for _ in range(3):  # the host runs ahead, and memory must not
            run(**given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base

    activations = peak(there)
    budget = 96 * MIB
    streamed = Stream(program, cuda, budget=budget)
    assert streamed.peak <= budget
    assert peak(streamed) < activations + budget + 16 * MIB < program.nbytes


def test_an_interrupted_run_leaves_nothing_on_its_way(cuda, program, there):
    streamed = Stream(program, cuda)
    before = torch.cuda.memory_allocated()

    class Fail(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            if self.count == 300:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with pytest.raises(KeyboardInterrupt), Fail():
        streamed(**call(cuda))
    assert torch.cuda.memory_allocated() <= before + MIB
    assert torch.equal(streamed(**call(cuda))[0], there(**call(cuda))[0])


def test_what_is_learned_does_not_depend_on_where_the_weights_are(cuda, program, there):
    near, far = Calibration(there), Calibration(program, device=cuda, undo=True)
    for step in (900.0, 300.0, 250.0):
        given = {**call(cuda), "timestep": torch.tensor([step], device=cuda)}
        near.observe(given, "cond")
        far.observe(given, "cond")
    mine, other = near.stats(), far.stats()
    assert mine.tally == other.tally
    for site, one in mine.channels.items():
        found = other.channels[site]
        assert found.amax.device.type == "cpu"
        for part in ("amax", "count", "sample", "priority"):
            assert torch.equal(getattr(one, part).cpu(), getattr(found, part)), (site, part)
    for key, head in mine.heads.items():
        assert torch.equal(head.low.cpu(), other.heads[key].low)


def test_a_model_on_the_host_is_compiled_on_the_gpu(cuda):
    """Scales are searched and weights rounded over there, and all of it comes back."""
    torch.manual_seed(0)
    model = presets.build(presets.truncated(PRESET, 1), device="cpu")
    calls = [{**call("cpu"), "timestep": torch.tensor([step])} for step in (900.0, 500.0)]
    compiled = wancompile.compile(model, calls, "int8", device="cuda", limits=None)
    assert {tensor.device.type for tensor in compiled.program.state.values()} == {"cpu"}
    assert any(group.smoothing is not None for group in compiled.report.groups)
    expected = model.cuda()(**call(cuda), return_dict=False)[0]
    found = compiled.to("cuda")(**call(cuda), return_dict=False)[0]
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.05
