from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import WEIGHTS, X, attend, heads, joined, normal, plain, quantized
from torch import nn

from wancompile.errors import InputError
from wancompile.export import export
from wancompile.ir import edit, match
from wancompile.ir.site import Site
from wancompile.pipeline import relative_error
from wancompile.program import nest


@pytest.fixture(scope="module")
def program():
    return normal(attend, **WEIGHTS)


def test_a_program_runs_like_its_model(program):
    x = torch.randn(3, 7, X.shape[-1])
    q, k, v = (F.linear(x, WEIGHTS[f"w{n}"], WEIGHTS[f"b{n}"]) for n in "qkv")
    mixed = joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))
    expected = F.linear(mixed, WEIGHTS["wo"], WEIGHTS["bo"])
    assert relative_error(program(x=x), expected) < 1e-6
    assert torch.equal(program(x), program(x=x))
    assert not program(x).requires_grad


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {}, "x is missing"),
        ((), {"y": X}, "forward has no parameter 'y'; it has x"),
        ((X, X), {}, "2 positional arguments given, forward takes 1"),
        ((X,), {"x": X}, "x is given both by position and by name"),
        ((X[0],), {}, "x has shape 5x12, the program takes \\*x\\*x12"),
        ((X[..., :5],), {}, "x has shape 2x5x5, the program takes \\*x\\*x12"),
        ((X.long(),), {}, "x is torch.int64, the program takes torch.float32"),
    ],
)
def test_wrong_calls_are_explained(program, args, kwargs, reason):
    with pytest.raises(InputError, match=reason):
        program(*args, **kwargs)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, pair, names, flag=True, other=None):
        return {"sum": self.proj(pair[0]) + pair[1], "rest": (names["a"],)}


def test_nested_arguments_and_results_keep_their_structure():
    call = {"pair": [torch.randn(2, 4), torch.randn(2, 4)], "names": {"a": torch.ones(2)}}
    program = export(Nested(), [{**call, "flag": True}])
    out = program(**call)
    assert out.keys() == {"sum", "rest"}
    assert torch.equal(out["rest"][0], call["names"]["a"])
    with pytest.raises(InputError, match="flag is False, but the program was traced with True"):
        program(**call, flag=False)
    with pytest.raises(InputError, match="traced without the tensor other"):
        program(**call, other=torch.ones(2))
    with pytest.raises(InputError, match=r"pair\[1\] is missing"):
        program(pair=call["pair"][:1], names=call["names"])


def test_values_at_sites_can_be_asked_for(program):
    wanted = (Site(name) for name in ("wk", "wv", "attention"))
    values = program.values(wanted, X)
    assert set(values) == {Site("wk"), Site("wv"), Site("attention")}
    expected = F.linear(X, WEIGHTS["wk"], WEIGHTS["bk"])
    torch.testing.assert_close(values[Site("wk")], expected)
    assert program.values([Site("nowhere")], x=X) == {}


def test_two_levels_agree_on_sites(program):
    sites = [Site("wq"), Site("wo")]
    before, after = program.values(sites, X), quantized(program, plain("int8")).values(sites, X)
    errors = [relative_error(after[site], before[site]) for site in sites]
    assert all(0 < error < 0.05 for error in errors)


def test_a_draft_is_a_private_copy(program):
    text = program.print()
    draft = program.draft()
    node = match.nodes_of(draft.graph, torch.ops.aten.linear.default)[0]
    draft.set_args(node, (*node.args[:2], None))
    draft.store("new", torch.ones(1), before=node)
    node.meta["site"] = Site("another")
    assert program.print() == text
    assert "new" not in program.state
    assert all(draft.state[name] is tensor for name, tensor in program.state.items())


def test_consuming_takes_the_weights_away():
    program = normal(attend, **WEIGHTS)
    program(x=X)
    draft = program.draft(consume=True)
    assert set(draft.state) == set(WEIGHTS)
    assert not program.state


def test_a_program_moves_between_devices(program):
    moved = program.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.state.values())
    assert not any(tensor.is_meta for tensor in program.state.values())
    assert moved.print() == program.print()


def test_ops_that_make_tensors_move_too():
    class Shifted(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1], device=x.device)[None, :, None]

    program = export(Shifted(), [{"x": X}])
    draft = program.draft()
    edit.move(draft, torch.device("meta"))
    made = [node for node in draft.graph.nodes if "device" in node.kwargs]
    assert made
    assert all(node.kwargs["device"].type == "meta" for node in made)


def test_bytes_are_those_of_the_stored_tensors(program):
    assert program.nbytes == 4 * (4 * 12 * 12 + 4 * 12)


def test_state_becomes_a_tree_of_buffers():
    root = nest({"a.b.weight": torch.ones(2), "a.c": torch.zeros(1), "d": torch.ones(3)})
    assert dict(root.named_buffers()).keys() == {"a.b.weight", "a.c", "d"}
    assert not list(root.parameters())


def test_values_move_with_the_graph_and_the_original_stays(program):
    """What a pass stores later goes where the values are that it will meet."""

    def places(graph: torch.fx.Graph) -> set[str]:
        values = (node.meta.get("val") for node in graph.nodes)
        return {one.device.type for one in values if isinstance(one, torch.Tensor)}

    graph = edit.copy_graph(program.graph)
    edit.retarget(graph, torch.device("cuda"))
    assert places(graph) == {"cuda"}
    assert places(program.graph) == {"cpu"}
