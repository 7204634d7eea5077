"""Compiled models that torch exports, saves and loads again."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import loras
import pytest
import torch
import zoo
from exporting import call, compiled_apart, output
from torch import nn

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError

RUN = """
import sys
import torch
import wancompile  # it knows the ops

folder = sys.argv[1]
run = torch.export.load(f"{folder}/exported.pt2").module()
calls = torch.load(f"{folder}/calls.pt")
with torch.no_grad():
    torch.save([run(**call, return_dict=False)[0] for call in calls], f"{folder}/outputs.pt")
"""


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return zoo.make("t2v", 1)[0]


@pytest.fixture(scope="module")
def compiled(wan) -> CompiledModel:
    return compiled_apart(wan)


def test_it_takes_what_the_original_takes(wan, compiled):
    ours, theirs = (inspect.signature(one.forward).parameters for one in (compiled, wan))
    assert list(ours) == list(theirs)
    required = [name for name, one in theirs.items() if one.default is inspect.Parameter.empty]
    assert required == [name for name, one in ours.items() if one.default is one.empty]


def test_what_is_exported_runs_elsewhere_at_other_sizes(compiled, tmp_path):
    kwargs = {**call(0), "return_dict": False}
    shapes = {**zoo.dynamic_shapes(call(0)), "return_dict": None}
    exported = torch.export.export(compiled, (), kwargs, dynamic_shapes=shapes)
    assert exported.state_dict.keys() <= {f"lowered.{name}" for name in compiled.program.state}
    assert not exported.constants  # every weight has its name
    torch.export.save(exported, tmp_path / "exported.pt2")
    torch.save([call(0), call(1)], tmp_path / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=Path(wancompile.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for at, found in enumerate(torch.load(tmp_path / "outputs.pt")):
        assert torch.equal(found, output(compiled, call(at)))


def test_positional_arguments_and_a_lora_are_exported_too(wan, compiled):
    before = output(compiled, call(0))
    compiled.load_lora(loras.as_peft(loras.random(wan, 4)))
    try:
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        args = tuple(call(0)[name] for name in names)
        exported = torch.export.export(compiled, args, {"return_dict": False})
        found = exported.module()(*args, return_dict=False)[0]
        assert torch.equal(found, output(compiled, call(0)))
    finally:
        compiled.unload_lora("default")
    assert not torch.equal(found, before)


def test_weights_on_the_host_are_not_exported(compiled, monkeypatch):
    """On a CPU nothing is moved away, so the model is told that something was."""
    monkeypatch.setattr(compiled._loop, "away", True)
    with pytest.raises(InputError, match=r"are on the host, .* call hoist\(\) before torch.export"):
        torch.export.export(compiled, (), call(0))
