from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from kit import exported
from small import WEIGHTS, X, attend, normal, plain

from wancompile import pipeline
from wancompile.errors import CalibrationError, LevelError, NumericsError
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.passes import NORMALIZE, QuantizeAttention, QuantizeLinears
from wancompile.pipeline import Probe, relative_error

aten = torch.ops.aten
PROBE = Probe({"x": X})
INT8 = plain("int8")


@dataclass(frozen=True)
class Scale:
    """Multiplies the output of the last linear by `factor` and says so."""

    factor: float

    name: ClassVar[str] = "scale"
    needs: ClassVar[Level] = Level.NORMAL
    gives: ClassVar[Level] = Level.NORMAL
    exact: ClassVar[bool] = True

    def apply(self, draft: Any) -> None:
        node = match.nodes_of(draft.graph, aten.linear.default)[-1]
        with draft.graph.inserting_after(node):
            scaled = draft.graph.call_function(aten.mul.Tensor, (node, self.factor))
        scaled.meta["val"] = match.val(node)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        draft.did(node, f"times {self.factor}")


@dataclass(frozen=True)
class Roughly(Scale):
    """The same, without the claim to be exact."""

    name: ClassVar[str] = "roughly"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Refuse(Scale):
    """Spoils its draft and raises an error that knows its site and source."""

    name: ClassVar[str] = "refuse"

    def apply(self, draft: Any) -> None:
        match.nodes_of(draft.graph, aten.linear.default)[-1].target = torch.relu
        draft.state.clear()
        raise CalibrationError("no", site="wq", source="model.py, line 3")


@pytest.fixture
def program():
    return normal(attend, **WEIGHTS)


# Exactness --------------------------------------------------------------------------------------


def test_an_exact_pass_that_is_not_is_caught(program):
    with pytest.raises(NumericsError, match=r"moved by 1.00e-02 .* more than 2e-04") as caught:
        pipeline.run(program, [Scale(1.01)], probe=PROBE)
    assert caught.value.pass_name == "scale"


def test_nan_is_no_small_error(program):
    with pytest.raises(NumericsError, match="nan"):
        pipeline.run(program, [Scale(float("nan"))], probe=PROBE)


def test_every_output_is_compared():
    """The NaN is in the second output, and the first one is right."""
    two = normal(lambda m, x: (x, attend(m, x)), **WEIGHTS)
    with pytest.raises(NumericsError):
        pipeline.run(two, [Scale(float("nan"))], probe=PROBE)


def test_rounding_passes_are_not_compared(program):
    after = pipeline.run(program, [Roughly(1.01)], probe=PROBE)
    assert after.records[-1].error is None


def test_consecutive_exact_passes_are_compared_once(program):
    """Two that undo each other are right together; the error is noted at the last of them."""
    after = pipeline.run(program, [Scale(2.0), Scale(0.5)], probe=PROBE)
    assert [record.error for record in after.records[-2:]] == [None, 0.0]
    with pytest.raises(NumericsError) as caught:
        pipeline.run(program, [Scale(2.0), Roughly(1.0), Scale(0.5)], probe=PROBE)
    assert caught.value.pass_name == "scale"


def test_without_a_probe_nothing_runs(program):
    after = pipeline.run(program, [Scale(1.01)])
    assert relative_error(after(x=X), program(x=X)) == pytest.approx(0.01, rel=1e-3)


def test_normalizing_is_exact():
    start = exported(attend, X, **WEIGHTS)
    after = pipeline.run(start, NORMALIZE, probe=PROBE)
    assert after.records[-1].error < 1e-6


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [([1.0, 2.0], [1.0, 2.0], 0.0), ([3.0, 4.5], [3.0, 4.0], 0.1), ([0.0], [0.0], 0.0)],
)
def test_relative_error(actual, expected, error):
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error)


# Levels and errors -------------------------------------------------------------------------------


def test_a_pass_at_the_wrong_level_is_refused(program):
    with pytest.raises(LevelError, match="needs level QUANTIZED, the program is at NORMAL") as e:
        pipeline.run(program, [QuantizeLinears(INT8)])
    assert e.value.pass_name == "quantize_linears"


def test_an_error_gets_the_name_of_its_pass(program):
    with pytest.raises(CalibrationError) as caught:
        pipeline.run(program, [Refuse(1.0)])
    assert str(caught.value).splitlines() == [
        "no",
        "  site: wq",
        "  source: model.py, line 3",
        "  pass: refuse",
    ]


def test_a_broken_graph_names_the_pass(program):
    @dataclass(frozen=True)
    class Break(Scale):
        name: ClassVar[str] = "break"

        def apply(self, draft: Any) -> None:
            match.nodes_of(draft.graph, aten.linear.default)[-1].target = torch.relu

    with pytest.raises(LevelError, match="relu is not known at level NORMAL") as caught:
        pipeline.run(program, [Break(1.0)])
    assert caught.value.pass_name == "break"


@pytest.mark.parametrize("broken", [Refuse(1.0), Scale(float("nan"))], ids=["refuses", "wrong"])
def test_the_program_before_is_untouched_by_a_failure(program, broken):
    text, expected, state = program.print(), program(x=X), dict(program.state)
    with pytest.raises((CalibrationError, NumericsError)):
        pipeline.run(program, [Scale(1.0), broken], probe=PROBE)
    assert program.print() == text
    assert program.state.keys() == state.keys()
    assert all(program.state[name] is tensor for name, tensor in state.items())
    assert torch.equal(program(x=X), expected)


def test_consumed_weights_are_given_up(program):
    expected = program(x=X)
    after = pipeline.run(program, [Scale(2.0), Scale(0.5)], probe=PROBE, consume=True)
    assert not program.state
    assert torch.equal(after(x=X), expected)


# Records and dumps -------------------------------------------------------------------------------


def test_a_record_tells_what_a_pass_did(program):
    record = pipeline.run(program, [Scale(2.0)]).records[-1]
    assert (record.name, record.identity) == ("scale", "Scale(factor=2.0)")
    assert (record.level, record.nodes_after - record.nodes_before) == (Level.NORMAL, 1)
    assert [(note.site, note.text) for note in record.done] == [("wo", "times 2.0")]
    assert record.seconds > 0


def test_records_add_up(program):
    after = pipeline.run(program, [Scale(2.0), QuantizeAttention(INT8)])
    assert [record.name for record in after.records[len(program.records) :]] == [
        "scale",
        "quantize_attention",
    ]


def test_dumps_are_numbered(tmp_path):
    start = exported(attend, X, **WEIGHTS)
    after = pipeline.run(start, NORMALIZE, dump=tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names[0] == "00_start.txt"
    expected = [f"{i:02d}_{one.name}" for i, one in enumerate(NORMALIZE, start=1)]
    assert names[1:] == [f"{stem}.{end}" for stem in expected for end in ("diff", "txt")]
    assert (tmp_path / "new" / f"{expected[-1]}.txt").read_text() == after.print()


def test_a_dumped_diff_shows_the_change(program, tmp_path):
    quantized = replace(program, records=())
    pipeline.run(quantized, [QuantizeAttention(INT8), QuantizeLinears(INT8)], dump=tmp_path)
    assert (tmp_path / "01_quantize_attention.diff").read_text() == ""
    changed = (tmp_path / "02_quantize_linears.diff").read_text().splitlines()
    assert any(line.startswith("-%linear") and "linear(%x, wq, bq)" in line for line in changed)
    assert any(line.startswith("+") and "per_token(%x, None, i8)" in line for line in changed)


def test_no_pass_changes_nothing(program):
    assert pipeline.run(program, []) is program
