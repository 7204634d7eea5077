"""One graph for every size: nothing is captured, quantized or compiled a second time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import wancompile
from wancompile import pipeline
from wancompile.compiled import CompiledModel
from wancompile.pipeline import relative_error

LATENTS = ((1, 4, 4), (2, 8, 6), (3, 4, 10), (5, 2, 2), (4, 6, 8))
BATCHES = (1, 2, 3)
# To dynamo a size of 1, of the batch or in patches, is another graph, and sizes that are equal in
# the first call are one, whatever the backend.
OPEN_LATENTS = ((3, 8, 12), (3, 4, 10), (5, 4, 4), (4, 6, 8), (6, 10, 4))
OPEN_BATCHES = (2, 3, 4)


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return zoo.make("t2v", 1)[0]


@pytest.fixture(scope="module")
def compiled(wan: nn.Module) -> CompiledModel:
    """A model with every kind of op: 8-bit linears and attention, fused passes over memory."""
    calls = [zoo.example("t2v", 1, seed=seed) for seed in range(2)]
    found = wancompile.compile(wan, calls, "int8-attention", limits=None)
    found.hoist(0)  # the whole program in one graph
    return found


def call(batch: int, latent: tuple[int, int, int]) -> dict[str, Tensor]:
    return zoo.make("t2v", 1, batch=batch, latent=latent, seed=batch)[1]


def output(model: nn.Module, kwargs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**kwargs, return_dict=False)[0]


def test_five_resolutions_and_three_batch_sizes_run_one_graph(
    wan: nn.Module, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, code = compiled.lowered, compiled.lowered.code
    monkeypatch.setattr(torch.export, "export", None)
    monkeypatch.setattr(pipeline, "run", None)  # no pass runs any more
    for batch, latent in product(BATCHES, LATENTS):
        kwargs = call(batch, latent)
        assert relative_error(output(compiled, kwargs), output(wan, kwargs)) < 0.02
    assert compiled.lowered is graph
    assert graph.code == code
    assert counters["stats"]["unique_graphs"] == 0


def test_the_backend_compiles_one_graph_without_a_break(wan: nn.Module) -> None:
    options = {"recipe": "int8"}
    quantized = torch.compile(
        wan, backend="wancompile", fullgraph=True, dynamic=True, options=options
    )
    for at, (batch, latent) in enumerate(product(OPEN_BATCHES, OPEN_LATENTS)):
        with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
            kwargs = call(batch, latent)
            assert relative_error(output(quantized, kwargs), output(wan, kwargs)) < 0.02
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_torch_compile_takes_a_compiled_model_whole(compiled: CompiledModel) -> None:
    again = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, latent in zip(OPEN_BATCHES, OPEN_LATENTS, strict=False):
        kwargs = call(batch, latent)
        torch.testing.assert_close(output(again, kwargs), output(compiled, kwargs))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_torch_exports_and_saves_gives_the_same_bits(compiled: CompiledModel) -> None:
    signature = compiled.program.signature
    example = call(2, OPEN_LATENTS[0])
    specs = zoo.dynamic_shapes(example)
    exported = torch.export.export(
        compiled.program.module,
        tuple(signature.bind((), example)),
        dynamic_shapes=tuple(specs[one.name] for one in signature.inputs),
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, latent in zip(OPEN_BATCHES, OPEN_LATENTS, strict=False):
        kwargs = call(batch, latent)
        with torch.no_grad():
            leaves = loaded(*signature.bind((), kwargs))
        assert torch.equal(signature.unflatten(leaves)[0], output(compiled, kwargs))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"wancompile.scaled_linear.default", "wancompile.scaled_attention.default"} <= targets
