"""Times of parts: predicted, measured, and as text."""

from __future__ import annotations

import pages
import pytest
from pages import Made

from wancompile.cost import FLOAT, costs
from wancompile.report import Report
from wancompile.times import FIXED, REST, as_text, measure, part_of, predict

made = pytest.fixture(scope="module")(pages.made)


def test_parts_add_up_to_what_a_recipe_costs(made: Made) -> None:
    found = costs(made.normal)
    recipe = made.report.recipe
    predicted = predict(found, recipe, made.normal.groups)
    assert predicted.ms == pytest.approx(found.of(recipe, made.normal.groups))
    as_float = sum(one.ms[FLOAT] for one in found.sites) + found.fixed
    assert sum(one.float_ms for one in predicted.parts) == pytest.approx(as_float)
    assert predicted.parts[-1].part == FIXED
    assert made.report.predicted == predicted
    assert Report.from_data(made.report.to_data()) == made.report


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (1234.5, "1.23 s"),
        (12.345, "12.3 ms"),
        (0.9996, "1 ms"),
        (0.0123, "12.3 us"),
        (2e-6, "2 ns"),
    ],
)
def test_times_have_a_unit_that_suits(ms: float, text: str) -> None:
    assert as_text(ms) == text


def test_what_feeds_one_part_alone_belongs_to_it(made: Made) -> None:
    program = made.compiled.program
    parts = part_of(program, program.graph)
    found: dict[str, set[str]] = {}
    for node, part in parts.items():
        found.setdefault(str(node.target), set()).add(part)
    op = "wancompile.{}.default".format
    assert found[op("gelu_quantize")] == {"ffn_down_proj"}
    assert found[op("scaled_linear_residual")] <= {"attn_out_proj", "ffn_down_proj"}
    assert found[op("norm_quantize")] <= {
        "attn_qkv_proj",
        "attn_q_proj",
        "ffn_up_proj",
    }
    assert REST in parts.values()


def test_times_are_measured_part_by_part(made: Made) -> None:
    found = measure(made.compiled.program, made.call, runs=2)
    roles = {str(group.role) for group in made.normal.groups}
    assert roles | {"self-attention", "cross-attention", REST} <= found.parts.keys()
    assert all(ms > 0 for ms in found.parts.values())
    assert found.runs == 2
    assert "CPU" in found.device
