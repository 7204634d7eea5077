"""Give every linear and every attention its site, the name it keeps through all rewrites.

Law: none; nothing is rewritten. A linear is named by the stored weight it reads (or that its
weight is computed from), an attention by the module that calls it, and both count their calls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Site


@dataclass(frozen=True)
class NameSites:
    """Set the site of each linear and attention."""

    name: ClassVar[str] = "name_sites"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Count calls per path in execution order; linears and attentions count apart."""
        calls: Counter[tuple[bool, str]] = Counter()
        for node in draft.graph.nodes:
            if not (match.is_float_linear(node) or match.is_attention(node)):
                continue
            path = _weight_path(node) if match.is_float_linear(node) else match.module_path(node)
            key = (match.is_float_linear(node), path)
            suffix = path if match.is_float_linear(node) else f"{path}:attention".lstrip(":")
            node.meta["site"] = Site(suffix, calls[key])
            calls[key] += 1


def _weight_path(node: Node) -> str:
    name = match.stored_name(match.args(node)[1])
    return name.removesuffix(".weight") if name else match.module_path(node) or "linear"
