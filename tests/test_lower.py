from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from kit import counts
from small import fused, plain, quantized
from torch import nn

from wancompile import compiled, pipeline
from wancompile.calibrate import Calibration
from wancompile.export import export
from wancompile.ir.levels import Level
from wancompile.kernels import base
from wancompile.passes import NORMALIZE, Lower

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, HEAD_DIM = 2, 16


class Block(nn.Module):
    """Attention with 32 channels and a last projection to `width`, at sizes that GPUs multiply."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        size = HEADS * HEAD_DIM
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, width)

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


X = torch.randn(2, 20, HEADS * HEAD_DIM)


def program(dtype: str, width: int = 32):
    normal = pipeline.run(export(Block(width), [{"x": X}]), NORMALIZE)
    calibration = Calibration(normal)
    calibration(x=X)
    return fused(quantized(normal, plain(dtype, attention=dtype), calibration.stats()))


@pytest.fixture
def hopper(monkeypatch):
    give(monkeypatch, (9, 0))


def give(monkeypatch, capability):
    monkeypatch.setattr(base, "capability", lambda device: capability)
    monkeypatch.setattr(base, "lacks_triton", lambda: None)


def test_a_cpu_keeps_the_plain_bodies(golden):
    after = pipeline.run(program("int8"), [Lower(CPU)])
    golden(after.print("canonical"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_plain_bodies_compute_the_same_bits(dtype):
    before = program(dtype)
    after = pipeline.run(before, [Lower(CPU)])
    assert after.level is Level.LOWERED
    assert torch.equal(after(x=X), before(x=X))
    notes = {note.site: note.text for note in after.records[-1].done}
    assert notes["wancompile.scaled_linear.default"] == "2 x plain body"
    calls = {"int8": 3, "fp8": 2}[dtype]  # of queries in int8, too
    assert notes["wancompile.quantize_per_token.default"] == f"{calls} x plain body"
    assert {note.text for note in after.records[-1].skipped} >= {
        "2 x no kernel: each needs a CUDA device, not cpu"
    }


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((9, 0), "int8", "linear_hopper"),
        ((9, 0), "fp8", "fp8_linear_scaled_mm"),  # 32 channels are few
        ((8, 9), "int8", "int8_linear_int_mm"),
        ((8, 9), "fp8", "fp8_linear_scaled_mm"),
    ],
)
def test_a_gpu_gets_kernels(monkeypatch, capability, dtype, kernel):
    give(monkeypatch, capability)
    before = program(dtype)
    after = pipeline.run(before, [Lower(CUDA)])
    assert counts(after)[kernel] == 2  # q, k and v are one product
    assert counts(after)["attention_dequantize_sdpa"] == 1
    of_queries = dtype == "int8"  # by scales of their own
    assert counts(after)["quantize_per_token_triton"] == 2 + of_queries
    assert counts(after)["quantize_per_head_triton"] == 2 - of_queries
    assert not {"scaled_linear", "scaled_attention"} & set(counts(after))
    assert len(after.graph.nodes) == len(before.graph.nodes)


@pytest.mark.parametrize(
    ("capability", "plain"), [((9, 0), ""), ((8, 6), "scaled_linear"), ((7, 5), "scaled_attention")]
)
def test_products_that_stay_plain_on_a_gpu_are_warned_of(monkeypatch, capability, plain):
    """fp8 products want 8.9 or newer: an older card computes them without tensor cores."""
    give(monkeypatch, capability)
    after = pipeline.run(program("fp8"), [Lower(CUDA)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled.warn_of_plain(after, CUDA)
        compiled.warn_of_plain(after, CPU)
    assert [plain in str(one.message) for one in caught] == [True] * bool(plain)


def test_amd_has_no_cuda_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    after = pipeline.run(program("int8"), [Lower(CUDA)])
    assert counts(after)["scaled_linear"] == 2
    reasons = {note.text for note in after.records[-1].skipped}
    assert "2 x no kernel: each needs a CUDA device, not ROCm" in reasons


@pytest.mark.usefixtures("hopper")
def test_each_op_is_chosen_on_its_own():
    """19 output channels fit no kernel; the other product keeps its own."""
    after = pipeline.run(program("int8", width=19), [Lower(CUDA)])
    assert counts(after)["linear_hopper"] == 1
    assert counts(after)["scaled_linear"] == 1
    reasons = [note.text for note in after.records[-1].skipped]
    assert "1 x not linear_triton: N=19 is not a multiple of 16" in reasons


@pytest.mark.usefixtures("hopper")
def test_sites_move_along():
    after = pipeline.run(program("int8"), [Lower(CUDA)])
    sites = {str(node.meta["site"]) for node in after.graph.nodes if "site" in node.meta}
    assert sites == {"q", "k", "v", "out", "attention"}
