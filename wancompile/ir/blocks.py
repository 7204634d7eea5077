"""The repeated blocks of a model, as the paths of its modules tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.fx import Graph, Node

from wancompile.ir import match


def blocks(sites: Iterable[str]) -> dict[str, str]:
    """Return the repeated block of each site that lies in one, such as `layers.3`.

    A block is the path up to the first number. Of several lists of modules in a model the one that
    holds the most sites counts: others are parts of an embedder or of a side branch.
    """
    found = {site: block for site in sites if (block := _block(site))}
    families = Counter(block.rpartition(".")[0] for block in found.values())
    largest = families.most_common(1)[0][0] if families else ""
    return {site: block for site, block in found.items() if block.rpartition(".")[0] == largest}


def _block(path: str) -> str:
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def block_outputs(graph: Graph) -> dict[Node, str]:
    """Return the value that leaves each block, with the path of the block.

    It is the last value made in a block that something outside of it reads. From FUSED on there is
    no such value: an op that begins a block may end the one before.
    """
    paths = set(blocks(str(site) for site in match.by_site(graph)).values())
    inside = {node: _block(match.module_path(node)) for node in graph.nodes}
    last: dict[str, Node] = {}
    for node, path in inside.items():
        leaves = any(inside[reader] != path for reader in node.users)
        if path in paths and leaves and match.is_tensor(node):
            last[path] = node
    return {node: path for path, node in last.items()}
