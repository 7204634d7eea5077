"""What others do to a compiled model from outside: torch.compile, and hooks that it refuses."""

from __future__ import annotations

import pipes
from collections.abc import Callable
from typing import Any

import accelerate
import loras
import pytest
import torch
import zoo
from diffusers import hooks
from exporting import SIZES, call, compiled_apart, output
from torch import Tensor, nn

from wancompile import CompiledModel, CompiledPipeline, PipelineError
from wancompile.errors import InputError


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return zoo.make("t2v", 1)[0]


@pytest.fixture(scope="module")
def compiled(wan) -> CompiledModel:
    return compiled_apart(wan)


# torch.compile ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_torch_compile_takes_a_model_whole(compiled, fullgraph):
    """Prompts are kept by eager calls alone, before and after: a graph has no place for them."""
    expected = [output(compiled, call(at)) for at in range(len(SIZES))]
    misses = compiled._loop.cache.misses
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        del inputs
        graphs.append(graph)
        return graph

    again = torch.compile(compiled, backend=keep, fullgraph=fullgraph, dynamic=True)
    for at, one in enumerate(expected):
        assert torch.equal(output(again, call(at)), one)
    (graph,) = graphs
    assert any("wancompile" in str(node.target) for node in graph.graph.nodes)
    assert compiled._loop.cache.misses == misses
    assert torch.equal(output(compiled, call(0)), expected[0])
    assert compiled._loop.cache.misses == misses + 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_compile_sees_that_a_lora_came(wan, compiled):
    again = torch.compile(compiled, backend="eager", fullgraph=True)
    before = output(again, call(0))
    compiled.load_lora(loras.as_peft(loras.random(wan, 4)))
    try:
        found = output(again, call(0))
        assert torch.equal(found, output(compiled, call(0)))
        assert not torch.equal(found, before)
    finally:
        compiled.unload_lora("default")
    assert torch.equal(output(again, call(0)), before)


@pytest.mark.usefixtures("fresh_dynamo")
def test_weights_on_the_host_are_not_compiled(compiled, monkeypatch):
    """On a CPU nothing is moved away, so the model is told that something was."""
    monkeypatch.setattr(compiled._loop, "away", True)
    with pytest.raises(InputError, match=r"on the host, .* call hoist\(\) before .* torch.compile"):
        output(torch.compile(compiled, backend="eager"), call(0))


# Hooks -----------------------------------------------------------------------------------------


def cache(name: str, apply: str, **options: Any) -> Any:
    """One of diffusers' caches, skipped where it is not in this diffusers."""
    there = hasattr(hooks, name) and hasattr(hooks, apply)
    skip = pytest.mark.skipif(not there, reason=f"this diffusers has no {apply}")
    return pytest.param(name, apply, options, id=f"{name}-{'-'.join(options)}", marks=skip)


CACHES = [
    cache("FirstBlockCacheConfig", "apply_first_block_cache"),
    cache("FasterCacheConfig", "apply_faster_cache"),
    cache("TaylorSeerCacheConfig", "apply_taylorseer_cache"),
    cache("TaylorSeerCacheConfig", "apply_taylorseer_cache", use_lite_mode=True),
    cache("TaylorSeerCacheConfig", "apply_taylorseer_cache", cache_identifiers=[r".*\.0\.attn1"]),
    cache("MagCacheConfig", "apply_mag_cache", mag_ratios=[1.0] * 4, num_inference_steps=4),
    cache("SeaCacheConfig", "apply_sea_cache"),
    cache("TextKVCacheConfig", "apply_text_kv_cache"),
    cache("LayerSkipConfig", "apply_layer_skip", indices=[0]),
]


class Unhooked:
    """A model that must be left with the attributes and hooks that it has, its parts, too."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._had = self._has()

    def _has(self) -> dict[str, frozenset[str]]:
        return {name: frozenset(vars(one)) for name, one in self._model.named_modules()}

    def refuses(self, hook: Callable[[], object], reason: str) -> None:
        with pytest.raises(PipelineError, match=reason):
            hook()
        assert self._has() == self._had


@pytest.mark.parametrize(("name", "apply", "options"), CACHES)
def test_functions_that_hook_into_blocks_are_refused(compiled, name, apply, options):
    config = getattr(hooks, name)(**options)
    Unhooked(compiled).refuses(
        lambda: getattr(hooks, apply)(compiled, config), "a compiled model: caches, guiders and off"
    )


def test_a_cache_that_asks_classes_alone_finds_nothing(compiled):
    """The docs say so: `apply_pyramid_attention_broadcast` cannot be told from a look around."""
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    expected = output(compiled, call(0))
    hooks.apply_pyramid_attention_broadcast(compiled, config)
    assert not any(hasattr(one, "_diffusers_hook") for one in compiled.modules())
    assert torch.equal(output(compiled, call(0)), expected)
    with pytest.raises(PipelineError, match="PyramidAttentionBroadcastConfig cannot be used with"):
        compiled.enable_cache(config)


def test_offloading_block_by_block_is_refused(compiled):
    def offload() -> None:
        hooks.apply_group_offloading(
            compiled, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )

    Unhooked(compiled).refuses(offload, "offloading layer by layer hook into blocks")


def test_offloading_layer_by_layer_points_at_offloading_whole(compiled):
    pipe = pipes.make("t2v")
    CompiledPipeline({"transformer": compiled}, {"transformer": None}, None).attach(pipe)
    asked = pipes.arguments("t2v")
    expected = pipes.run(pipe, asked)
    Unhooked(compiled).refuses(
        lambda: pipe.enable_sequential_cpu_offload(device="cpu"),
        r"remove_all_hooks\(\), then pipe.enable_model_cpu_offload\(\), which moves it whole",
    )
    pipe.remove_all_hooks()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipes.run(pipe, pipes.arguments("t2v")), expected)
    with pytest.raises(PipelineError, match="a compiled model has a graph"):
        accelerate.cpu_offload(compiled, torch.device("cpu"))  # beside the hook that is there
    pipe.remove_all_hooks()


def test_it_has_no_blocks(compiled):
    assert str(compiled).startswith("CompiledModel(\n  (blocks): NoBlocks()\n")
    for reach in (lambda: compiled.blocks[0], lambda: list(compiled.blocks)):
        Unhooked(compiled).refuses(reach, "what loops over blocks cannot be used with a compiled")
    assert not any(name.startswith("blocks") for name in compiled.state_dict())
