"""Whole compiled models on a GPU: what they compute, and that they never wait or compile anew."""

from pathlib import Path

import pytest
import torch
from test_kernels_gpu import compilations

import wancompile
import wancompile.demo
from wancompile import presets
from wancompile.pipeline import relative_error

WEIGHTS = Path(wancompile.demo.__file__).parent / "weights" / "t2v"
ATTENTION = ["int8-attention", "int8-attention-fast", "fp8-attention"]
RECIPES = ["int8", "fp8", *ATTENTION]
LIMIT = {
    "int8": 0.01,
    "fp8": 0.025,
    "int8-attention": 0.01,
    "int8-attention-fast": 0.015,
    "fp8-attention": 0.04,
}


def call(
    device: torch.device, frames: int = 5, height: int = 24, width: int = 24, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Noise and text states in the shapes that the trained model takes."""
    draw = torch.Generator().manual_seed(frames * height)
    given = {
        "hidden_states": torch.randn(batch, 1, frames, height, width, generator=draw),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": torch.randn(batch, 512, 64, generator=draw),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    return presets.load(WEIGHTS, dtype=torch.float32).cuda()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_computes_what_it_did(cuda, trained, recipe, dtype):
    given = call(cuda)
    with torch.no_grad():
        exact = trained(**given, return_dict=False)[0]
    model = presets.load(WEIGHTS, dtype=dtype).to(cuda)
    cast = {name: one.to(dtype) if one.dim() > 1 else one for name, one in given.items()}
    compiled = wancompile.compile(model, [cast], recipe=recipe)
    out = compiled(**cast, return_dict=False)[0]
    assert relative_error(out, exact) < LIMIT[recipe]


@pytest.mark.parametrize("recipe", ATTENTION)
@pytest.mark.parametrize("name", ["t2v-1.3b", "i2v-14b", "ti2v-5b"])
def test_the_gpu_computes_what_the_cpu_does(cuda, recipe, name):
    """At the width of the published models, one block, few tokens."""
    preset = presets.truncated(presets.find(name), 1)
    torch.manual_seed(0)
    model = presets.build(preset, device="cuda", dtype=torch.bfloat16)
    given = presets.example_inputs(preset, latent=(3, 8, 12), device="cuda", dtype=torch.bfloat16)
    compiled = wancompile.compile(model, [given], recipe=recipe)
    out = compiled(**given, return_dict=False)[0].cpu()
    slow = compiled.cpu()(**{k: v.cpu() for k, v in given.items()}, return_dict=False)[0]
    assert relative_error(out, slow) < 0.03


@pytest.mark.parametrize("recipe", ATTENTION)
def test_no_call_waits_for_the_gpu_nor_compiles_anew(cuda, trained, recipe):
    compiled = wancompile.compile(trained, [call(cuda)], recipe=recipe)
    sizes = [{}, {"frames": 3}, {"height": 16, "width": 32}, {"batch": 2}]
    runs_on(compiled, [call(cuda, **size) for size in sizes], cuda)


@pytest.mark.parametrize("recipe", ATTENTION)
def test_nor_does_one_with_a_timestep_per_token(cuda, recipe):
    preset = presets.truncated(presets.find("ti2v-5b"), 1)
    torch.manual_seed(0)
    model = presets.build(preset, device="cuda", dtype=torch.bfloat16)
    sizes = [(3, 8, 12), (2, 8, 12), (3, 4, 20)]
    calls = [
        presets.example_inputs(preset, latent=size, device="cuda", dtype=torch.bfloat16)
        for size in sizes
    ]
    runs_on(wancompile.compile(model, calls[:1], recipe=recipe), calls, cuda)


def runs_on(compiled, calls, device) -> None:
    """Fail if any call but the first waits for the GPU, or compiles a kernel."""
    pytest.importorskip("triton")
    compiled(**calls[0])
    torch.cuda.synchronize()
    before = compilations(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in calls:
            compiled(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compilations(device) == before
