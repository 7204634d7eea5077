"""Find the projections of every attention, and the group each belongs to, from the dataflow.

Law: linears that read one value can share one smooth scale and one quantised input; linears that
read different values cannot. What feeds the q, k and v operands of an attention, walking back over
norms, rotations and reshapes, is its projections, whatever they are called:

    q, k, v read one value               -> self-attention, one group   attn_qkv_proj
    k, v read one value, q another       -> cross-attention, groups     attn_q_proj, attn_kv_proj
    two cross-attentions share one q     -> the one over image states   attn_add_kv_proj
    the linear that reads the output(s)  ->                             attn_out_proj

Image states are told from text states by their encoder: vision features are normalised on their
way to the projections, text features are not; where that does not decide, the branch that is added
second to the sum of both outputs is the added one.

Nothing is rewritten; the graph before is the graph after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.errors import DetectionError
from wancompile.ir import match
from wancompile.ir.dataflow import linears_behind
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention, Group, Role, Site, Source
from wancompile.passes import outputs, sources

aten = torch.ops.aten


@dataclass(frozen=True)
class _Read:
    """An attention and the linears that its operands come from."""

    node: Node
    q: Node
    k: Node
    v: Node

    @property
    def is_self(self) -> bool:
        return match.args(self.q)[0] is match.args(self.k)[0] is match.args(self.v)[0]


@dataclass(frozen=True)
class DetectAttention:
    """Group the projections around attentions."""

    name: ClassVar[str] = "detect_attention"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Read every attention, then group those that share a query."""
        reads = [
            read
            for node in match.nodes_of(draft.graph, *_ATTENTIONS)
            if (read := _read(draft, node))
        ]
        if not reads:
            raise _nothing_found(draft)
        groups: list[Group] = []
        attentions: list[Attention] = []
        for cluster in _clusters(reads):
            out = _output_groups(draft, cluster)
            groups += [*_input_groups(draft, cluster), *out]
            attentions += [_attention(read, out) for read in cluster]
        draft.groups = tuple(_merged(groups))
        draft.attentions = tuple(attentions)


_ATTENTIONS = (aten.scaled_dot_product_attention.default,)


def _nothing_found(draft: Draft) -> DetectionError:
    """Say what came nearest: an attention that was refused, or else a softmax."""
    reason = (
        "the model holds no attention whose projections can be proved, "
        "so there is nothing to quantize"
    )
    if draft.skipped:
        note = draft.skipped[0]
        return DetectionError(f"{reason}: {note.text}", site=note.site, source=note.source)
    softmax = next(iter(match.nodes_of(draft.graph, *match.SOFTMAX_OPS)), None)
    if softmax is None:
        return DetectionError(reason)
    return DetectionError(
        f"{reason}: there is a softmax, but what surrounds it is not raised to an attention",
        site=match.module_path(softmax) or None,
        source=match.source_line(softmax),
    )


def _read(draft: Draft, node: Node) -> _Read | None:
    operands = dict(zip("qkv", match.args(node)[:3], strict=True))
    found = {}
    for name, operand in operands.items():
        linears = linears_behind(operand)
        if len(linears) != 1:
            draft.skip(node, f"{name} comes from {len(linears)} linears, not from one", node)
            return None
        found[name] = linears[0]
    return _Read(node, **found)


def _attention(read: _Read, out: Sequence[Group]) -> Attention:
    q, k, v = (_site(linear) for linear in (read.q, read.k, read.v))
    return Attention(_site(read.node), q, k, v, read.is_self, out[0].key if out else None)


def _clusters(reads: Iterable[_Read]) -> list[list[_Read]]:
    """Put attentions with the same query projection together, in execution order."""
    clusters: dict[Node, list[_Read]] = {}
    for read in reads:
        clusters.setdefault(read.q, []).append(read)
    return list(clusters.values())


def _input_groups(draft: Draft, cluster: Sequence[_Read]) -> list[Group]:
    first = cluster[0]
    source = sources.of_stream(first.q)
    if first.is_self:
        return [_group(Role.ATTN_QKV, (first.q, first.k, first.v), source)]
    return [_group(Role.ATTN_Q, (first.q,), source), *_encoder_groups(draft, cluster)]


def _encoder_groups(draft: Draft, cluster: Sequence[_Read]) -> list[Group]:
    readable = []
    for read in cluster:
        if match.args(read.k)[0] is match.args(read.v)[0]:
            readable.append(read)
        else:
            draft.skip(read.node, "k and v are projected from different values", read.node)
    if len(readable) > 2:
        draft.skip(readable[0].node, f"{len(readable)} attentions share one query", None)
        return []
    if len(readable) == 2:
        text, image = _text_and_image(readable[0], readable[1])
        return [
            _group(Role.ATTN_KV, (text.k, text.v), Source.TEXT),
            _group(Role.ATTN_ADD_KV, (image.k, image.v), Source.IMAGE),
        ]
    return [_group(Role.ATTN_KV, (read.k, read.v), Source.TEXT) for read in readable]


def _text_and_image(a: _Read, b: _Read) -> tuple[_Read, _Read]:
    a_normed, b_normed = (sources.is_normalised(match.args(read.k)[0]) for read in (a, b))
    if a_normed != b_normed:
        return (b, a) if a_normed else (a, b)
    total = outputs.sum_of(a.node, b.node)
    if total is not None and b.node in outputs.attentions_behind(match.args(total)[0]):
        return b, a
    return a, b


def _output_groups(draft: Draft, cluster: Sequence[_Read]) -> list[Group]:
    readers = [
        user
        for form in outputs.forms(cluster[0].node)
        for user in match.readers(form)
        if match.is_float_linear(user) and outputs.made_of_attention(form)
    ]
    if not readers:
        draft.skip(cluster[0].node, "no linear reads the output", cluster[0].node)
        return []
    return [_group(Role.ATTN_OUT, (readers[0],), Source.ATTENTION)]


def _group(role: Role, linears: Sequence[Node], source: Source) -> Group:
    return Group(role, tuple(dict.fromkeys(map(_site, linears))), source)


def _merged(groups: Iterable[Group]) -> list[Group]:
    """Join groups that share a linear: whatever shares it reads the same value as the rest."""
    group_of: dict[Site, Group] = {}
    for group in groups:
        sharing = [group_of[site] for site in group.sites if site in group_of]
        every = dict.fromkeys(site for one in [*sharing, group] for site in one.sites)
        first = sharing[0] if sharing else group
        group_of.update(dict.fromkeys(every, replace(first, sites=tuple(every))))
    return list({group.key: group for group in group_of.values()}.values())


def _site(node: Node) -> Site:
    found = match.site(node)
    assert found is not None, "name_sites runs before detection"
    return found
