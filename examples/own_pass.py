"""A pass of your own, on a traced model.

python examples/own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

import wancompile
from wancompile import pipeline, presets
from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

LARGEST = 4096


@dataclass(frozen=True)
class StoreConstants:
    """Store what every call computes from nothing, as the frequencies of a timestep's embedding.

    Law: a pure op on constants is a constant, and at NORMAL all ops are pure.
    """

    name: ClassVar[str] = "store_constants"
    needs: ClassVar[Level] = Level.NORMAL
    gives: ClassVar[Level] = Level.NORMAL
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Compute all constants in order, and store those that something else reads."""
        known: dict[Node, Tensor] = {}
        for node in list(draft.graph.nodes):
            if node.op != "call_function" or not match.is_tensor(node):
                continue
            if not all(one in known for one in node.all_input_nodes):
                continue
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
        for node, value in known.items():
            if all(reader in known for reader in node.users):
                continue
            if value.numel() > LARGEST:
                draft.skip(node, f"{value.numel()} numbers are too many to store", node)
                continue
            draft.did(node, f"{value.numel()} numbers stored")
            draft.replace(node, draft.store("constant", value, before=node))
        draft.erase_dead()


def main() -> None:
    """Run the pass, let the runner check it on one call, and print what it did."""
    torch.manual_seed(0)
    preset = presets.truncated(presets.tiny(presets.find("t2v-14b")), 1)
    model = presets.build(preset, device="cpu", dtype=torch.float32)
    call = presets.example_inputs(preset, device="cpu", dtype=torch.float32)

    program = wancompile.trace(model, call)
    rewritten = pipeline.run(program, [StoreConstants()], probe=pipeline.Probe(call))
    record = rewritten.records[-1]
    for note in (*record.done, *record.skipped):
        print(f"{note.site}: {note.text}")
    nodes = f"{record.nodes_before} -> {record.nodes_after} nodes"
    print(f"{nodes}, output moved by {record.error:.0e}")


if __name__ == "__main__":
    main()
