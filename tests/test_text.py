from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from small import WEIGHTS, attend, normal, plain, quantized
from torch import nn
from torch.export import Dim

from wancompile.export import export
from wancompile.ir import text

HERE = Path(__file__).parent


class Video(nn.Module):
    """Sums, products and quotients of symbolic sizes."""

    def forward(self, x):
        patches = x.unflatten(2, (-1, 2)).flatten(1, 2)
        tokens = patches.flatten(1)
        return torch.cat([tokens, F.pad(tokens, (1, 2))], 1)


def rendered() -> str:
    return export(Video(), [{"x": torch.randn(2, 3, 8, 5)}, {"x": torch.randn(3, 4, 6, 7)}]).print(
        "canonical"
    )


def test_sizes_are_spelled_one_way(golden):
    golden(rendered())


def test_text_is_the_same_in_another_process():
    code = "import test_text; print(test_text.rendered(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == rendered()


class Renamed(nn.Module):
    """`Video` with an input of another name, from which torch makes the names of symbols."""

    def forward(self, another_name):
        return Video.forward(self, another_name)


def test_text_does_not_depend_on_the_names_of_symbols():
    shapes = {"another_name": dict.fromkeys(range(4), Dim.AUTO)}
    inputs = {"another_name": torch.randn(2, 3, 8, 5)}
    graph = torch.export.export(Renamed(), (), inputs, dynamic_shapes=shapes).graph
    expected = torch.export.export(
        Video(), (), {"x": inputs["another_name"]}, dynamic_shapes={"x": shapes["another_name"]}
    ).graph
    symbols = [str(next(iter(g.nodes)).meta["val"].shape) for g in (graph, expected)]
    assert symbols[0] != symbols[1]
    assert text.render(graph).replace("another_name", "x") == text.render(expected)


def test_canonical_names_do_not_depend_on_history():
    program = normal(attend, **WEIGHTS)
    draft = program.draft()
    for node in draft.graph.nodes:
        if node.op == "call_function":
            node._rename(f"renamed_{node.name}")
    assert text.render(draft.graph) == program.print("canonical")
    assert text.render(draft.graph, names="fx") != program.print()


def test_a_line_has_the_value_the_op_and_the_site():
    lines = normal(attend, **WEIGHTS).print("canonical").splitlines()
    assert lines[:2] == [
        "%x: f32[d0, d1, 12] = input",
        "%linear0: f32[d0, d1, 12] = linear(%x, wq, bq)  # wq",
    ]
    assert lines[-1] == "return [%linear3]"


def test_ops_are_counted_by_name():
    counts = text.op_counts(normal(attend, **WEIGHTS).graph)
    assert list(counts) == sorted(counts)
    assert counts["linear"] == 4
    assert counts["scaled_dot_product_attention"] == 1


def test_a_diff_shows_what_a_pass_changed():
    program = normal(attend, **WEIGHTS)
    shown = text.diff(program.print(), quantized(program, plain("int8")).print(), context=0)
    removed = [line for line in shown.splitlines() if line.startswith("-%linear")]
    added = [line for line in shown.splitlines() if line.startswith("+%scaled_linear")]
    for lines in (removed, added):
        assert [line.rpartition("# ")[2] for line in lines] == ["wq", "wk", "wv", "wo"]
    assert text.diff("a\n", "a\n") == ""


def test_every_type_has_a_short_name():
    class Types(nn.Module):
        def forward(self, x):
            return x.half(), x.double(), x > 0, x.to(torch.int32)

    graph = export(Types(), [{"x": torch.randn(2, 3)}]).graph
    assert all(name in text.render(graph) for name in ("f16[", "f64[", "bool[", "i32["))
