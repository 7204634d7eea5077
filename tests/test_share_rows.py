"""Rows of a modulation that repeat, read from one place: no bit changes, and it can be left out."""

from __future__ import annotations

import pytest
import torch
import zoo
from fusing import calls, program
from kit import counts, run_pass
from test_modulations import (
    TENSORS,
    X,
    all_three,
    cut,
    embedded,
    needed,
    normed,
    of_a_computed_table,
    selected,
)

import wancompile
from wancompile import CompiledModel, passes, pipeline
from wancompile.ir import match
from wancompile.passes import FuseNorm, FuseResidual, ShareRows
from wancompile.program import Program

HALF = X.shape[1] // 2


def unshared(fn, x=X, dtype=torch.float32) -> Program:
    after = run_pass(program(fn, x, **needed(fn, dtype)), FuseNorm())
    return run_pass(after, FuseResidual())


def shared(fn, x=X, dtype=torch.float32) -> Program:
    return run_pass(unshared(fn, x, dtype), ShareRows())


def two_norms(self, x):
    """Two ops that read one embedding: the quantised norm, and a sum that no norm follows."""
    six = self.table + embedded(self, x)
    return normed(x) * cut(six, 1) + cut(six, 0), x + torch.tanh(x) * cut(six, 2)


def test_which_rows_repeat_is_found_once(golden):
    golden(shared(two_norms).print("canonical"))


def test_the_rows_are_those_of_the_embedding():
    after = shared(selected)
    ((*_, rows, _, _, _),) = calls(after, "norm_quantize")
    assert match.is_op(rows, torch.ops.wancompile.repeated_rows.default)
    assert match.shape(rows.args[0])[2:] == (6, X.shape[-1])
    found = torch.ops.wancompile.repeated_rows(embedded(type("Self", (), TENSORS), X))
    assert found[:, :HALF].eq(0).all()
    assert found[0, HALF:].tolist() == list(range(HALF, X.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", [all_three, selected, two_norms])
def test_no_bit_changes(fn, dtype):
    x = X.to(dtype)
    without, after = unshared(fn, x, dtype), shared(fn, x, dtype)
    assert "repeated_rows" not in counts(without)
    assert counts(after)["repeated_rows"] == 1
    for y in (x, x[:1, :11], torch.cat([x, x + 1])):
        for ours, theirs in zip(after(x=y), without(x=y), strict=True):
            assert torch.equal(ours, theirs)


# What is left alone ----------------------------------------------------------------------------


def of_two_embeddings(self, x):
    """Where one repeats a row, the other need not."""
    one = self.table + embedded(self, x)
    two = self.other + x.unsqueeze(2) * self.wider
    return normed(x) * cut(one, 1) + cut(two, 0)


def of_an_embedding_and_of_none(self, x):
    return normed(x) * cut(self.table + embedded(self, x), 1) + torch.tanh(x)


@pytest.mark.parametrize(
    "fn", [of_two_embeddings, of_an_embedding_and_of_none, of_a_computed_table]
)
def test_rows_of_several_tensors_or_of_none_stay(fn):
    after = shared(fn)
    assert "repeated_rows" not in counts(after)
    (note,) = after.records[-1].skipped
    assert note.text == "its modulations are not cut from one tensor beside tables"


def test_a_modulation_per_video_has_no_rows():
    after = shared(lambda self, x: normed(x) * (1 + x.mean(1, keepdim=True)))
    assert "repeated_rows" not in counts(after)
    assert not after.records[-1].skipped


# A model with a timestep per token -------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> tuple[CompiledModel, CompiledModel]:
    """TI2V in miniature, with rows shared and without."""
    model, call = zoo.make("ti2v", 1)
    return tuple(wancompile.compile(model, [call], share_rows=one) for one in (True, False))


def test_a_compiled_model_says_that_rows_are_shared(both):
    shares, reads_all = (
        {one.name: one for one in model.report.records}.get("share_rows") for model in both
    )
    assert {note.text for note in shares.done} == {
        "rows of the modulation that repeat are read from one place"
    }
    assert "share_rows" in str(both[0].report)
    assert reads_all is None
    ours, theirs = (counts(model.program) for model in both)
    assert (ours["repeated_rows"], theirs.get("repeated_rows", 0)) == (1, 0)


def test_a_compiled_model_computes_the_same_bits_either_way(both, tmp_path):
    call = zoo.example("ti2v", 1, batch=2, seed=1)
    # An image's tokens are at timestep 0, those of the video at one of their own.
    call["timestep"] = torch.full_like(call["timestep"], 700)
    call["timestep"][:, : call["timestep"].shape[1] // 5] = 0
    ours, theirs = (model(**call).sample for model in both)
    assert torch.equal(ours, theirs)
    both[1].save(tmp_path / "saved")
    loaded = wancompile.load(tmp_path / "saved")
    assert counts(loaded.program) == counts(both[1].program)
    assert torch.equal(loaded(**call).sample, ours)


def test_it_is_exact_to_the_runner(both):
    """The runner compares the outputs before and after an exact pass: they are the same bits."""
    probe = pipeline.Probe(zoo.example("ti2v", 1, batch=1, seed=2))
    after = pipeline.run(both[1].fused, [ShareRows()], probe=probe)
    assert after.records[-1].error == 0
    assert counts(after) == counts(both[0].fused)


def test_the_passes_without_it_are_otherwise_the_same():
    assert passes.fusion() == passes.FUSE
    assert passes.fusion(share_rows=False) == passes.FUSE[:-1]
    assert passes.FUSE[-1] == ShareRows()
