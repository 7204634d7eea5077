"""Insert observers: one for each value that a group reads, one for each self-attention operand.

Law: an observer returns nothing and writes only to its own buffers, so the program computes what
it did before. q and k are observed as they are rounded, turned.

    before                                          after
    %y = ...                                        %y = ...
                                                    observe_channels(%y, amax, count, sample,
                                                                     priority, line, seed)
    %q = linear(%y, wq); %k = linear(%y, wk)        %q = linear(%y, wq); %k = linear(%y, wk)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention, Site
from wancompile.passes.quantize_attention import is_turned
from wancompile.quant.lines import HALVES, PER_RANGE

ops = torch.ops.wancompile

# Which line the channel observers write to in a call, and which the observers of heads.
LINE, HEAD_LINE = "observers.line", "observers.head_line"


@dataclass(frozen=True)
class Observe:
    """Observe producers and self-attention operands.

    `labels` is the number of timestep ranges kept apart (see `quant/lines.py` for the lines that
    each has), `rows` the size of the token sample per producer, `seed` draws it.
    """

    labels: int = 10
    rows: int = 256
    seed: int = 0

    name: ClassVar[str] = "observe"
    needs: ClassVar[Level] = Level.NORMAL
    gives: ClassVar[Level] = Level.OBSERVED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Insert each observer right before the first reader of what it observes."""
        nodes = match.by_site(draft.graph)
        for site in dict.fromkeys(group.observer for group in draft.groups):
            self._observe_channels(draft, site, nodes[site])
        for attention in draft.attentions:
            if attention.is_self and match.rank(nodes[attention.site]) == 4:
                self._observe_heads(draft, attention, nodes[attention.site])

    def _observe_channels(self, draft: Draft, site: Site, reader: Node) -> None:
        producer: Any = match.args(reader)[0]
        x = match.val(producer)
        lines = self.labels * PER_RANGE
        buffers = {
            "amax": torch.zeros(lines, x.shape[-1], device=x.device),
            "count": torch.zeros(lines, dtype=torch.int64, device=x.device),
            "sample": torch.zeros(self.rows, x.shape[-1], dtype=x.dtype, device=x.device),
            "priority": torch.full((self.rows,), torch.inf, dtype=torch.float64, device=x.device),
        }
        stored = [
            draft.store(buffer_name(site, part), buffer, before=reader)
            for part, buffer in buffers.items()
        ]
        line = _scalar(draft, LINE, x.device, reader)
        seed = _seed_of(self.seed, site)
        draft.call(
            ops.observe_channels.default, producer, *stored, line, seed, before=reader, like=reader
        )
        draft.did(site, "observed")

    def _observe_heads(self, draft: Draft, attention: Attention, node: Node) -> None:
        for operand, value in zip("qkv", match.args(node)[:3], strict=True):
            x = match.val(value)
            shape = (self.labels * HALVES, x.shape[1], x.shape[3])
            stored = [
                draft.store(
                    buffer_name(attention.site, f"{operand}.{part}"),
                    torch.full(shape, start, device=x.device),
                    before=node,
                )
                for part, start in (("low", torch.inf), ("high", -torch.inf))
            ]
            line = _scalar(draft, HEAD_LINE, x.device, node)
            turned = operand != "v" and is_turned(node)
            operands = value, *stored, line, turned
            draft.call(ops.observe_heads.default, *operands, before=node, like=node)
        draft.did(attention.site, "q, k, v observed")


def buffer_name(site: Site, part: str) -> str:
    """Return the name under which a buffer of the observer at `site` is stored."""
    return f"observers.{site}.{part}".replace("#", "_call_").replace(":", "_")


def _seed_of(seed: int, site: Site) -> int:
    """Return the site's own seed, a 63-bit number that is the same in every process."""
    digest = hashlib.blake2b(f"{seed} {site}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _scalar(draft: Draft, name: str, device: torch.device, before: Node) -> Node:
    if name not in draft.state:
        draft.state[name] = torch.zeros((), dtype=torch.int64, device=device)
    return draft.read(name, before=before)
