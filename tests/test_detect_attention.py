from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import Streams, before, exported, run_pass, table
from small import CHANNELS, WEIGHTS, X, attend, heads, joined, tensors

from wancompile.errors import DetectionError
from wancompile.export import export
from wancompile.ir.site import Role, Source
from wancompile.passes import DetectAttention

sdpa = F.scaled_dot_product_attention
BRANCHES = WEIGHTS | tensors("wk2", "wv2", "wk3", "wv3", "wtext", "wimage", seed=4)
CALL = {
    "x": X,
    "text": torch.randn(2, 7, CHANNELS, generator=torch.Generator().manual_seed(8)),
    "image": torch.randn(2, 3, CHANNELS, generator=torch.Generator().manual_seed(9)),
}


def detected(fn):
    program = export(Streams(fn, **BRANCHES), [CALL])
    return run_pass(before(program, DetectAttention), DetectAttention())


def roles(program):
    return [(group.role.name, *group.members) for group in program.groups]


def skips(program):
    return [note.text for note in program.records[-1].skipped]


def queries(self, x):
    return heads(F.linear(x, self.wq, self.bq))


def hear(self, q, states, which=""):
    k = F.linear(states, getattr(self, f"wk{which}"))
    v = F.linear(states, getattr(self, f"wv{which}"))
    return joined(sdpa(q, heads(k), heads(v)))


def out(self, y):
    return F.linear(y, self.wo, self.bo)


def itself(self, x, text, image):
    return attend(self, x)


def cross(self, x, text, image):
    return out(self, hear(self, queries(self, x), text))


def normed(image):
    return F.layer_norm(image, (CHANNELS,))


def text_and_image(self, x, text, image):
    q = queries(self, x)
    return out(self, hear(self, q, text) + hear(self, q, normed(image), "2"))


def image_and_text(self, x, text, image):
    q = queries(self, x)
    return out(self, hear(self, q, normed(image), "2") + hear(self, q, text))


def image_computed_last_and_added_first(self, x, text, image):
    q = queries(self, x)
    heard = hear(self, q, text)
    return out(self, hear(self, q, normed(image), "2") + heard)


CROSS_BOTH = [
    ("ATTN_Q", "wq"),
    ("ATTN_KV", "wk", "wv"),
    ("ATTN_ADD_KV", "wk2", "wv2"),
    ("ATTN_OUT", "wo"),
]


@pytest.mark.parametrize("fn", [itself, cross, text_and_image])
def test_groups(fn, golden):
    golden(table(detected(fn)))


@pytest.mark.parametrize(
    "fn", [text_and_image, image_and_text, image_computed_last_and_added_first]
)
def test_a_norm_on_the_way_tells_image_from_text(fn):
    program = detected(fn)
    assert roles(program) == CROSS_BOTH
    assert [group.source for group in program.groups][1:3] == [Source.TEXT, Source.IMAGE]


def test_a_norm_far_before_the_projections_counts():
    def fn(self, x, text, image):
        seen = F.gelu(F.linear(F.rms_norm(image, (CHANNELS,)), self.wimage))
        heard = F.gelu(F.linear(text, self.wtext))
        q = queries(self, x)
        return out(self, hear(self, q, seen, "2") + hear(self, q, heard))

    assert roles(detected(fn)) == CROSS_BOTH


def test_both_cut_from_one_concatenation():
    def fn(self, x, text, image):
        states = torch.cat([normed(image), F.linear(text, self.wtext)], 1)
        q = queries(self, x)
        heard = hear(self, q, states[:, image.shape[1] :])
        return out(self, heard + hear(self, q, states[:, : image.shape[1]], "2"))

    assert roles(detected(fn)) == CROSS_BOTH


@pytest.mark.parametrize("both_normed", [False, True])
@pytest.mark.parametrize("second_is_added_first", [False, True])
@pytest.mark.parametrize("second_is_computed_first", [False, True])
def test_of_two_like_branches_the_one_added_second_is_the_added_one(
    both_normed, second_is_added_first, second_is_computed_first
):
    def fn(self, x, text, image):
        q = queries(self, x)
        if both_normed:
            text, image = normed(text), normed(image)
        if second_is_computed_first:
            b = hear(self, q, image, "2")
            a = hear(self, q, text)
        else:
            a, b = hear(self, q, text), hear(self, q, image, "2")
        return out(self, b + a if second_is_added_first else a + b)

    pair = [("wk", "wv"), ("wk2", "wv2")]
    first, second = reversed(pair) if second_is_added_first else pair
    found = {role: members for role, *members in roles(detected(fn))}
    assert (tuple(found["ATTN_KV"]), tuple(found["ATTN_ADD_KV"])) == (first, second)


def test_the_sum_may_come_before_the_heads_are_joined():
    def fn(self, x, text, image):
        q = queries(self, x)
        k, v, k2, v2 = (
            heads(F.linear(states, weight))
            for states, weight in [
                (text, self.wk),
                (text, self.wv),
                (image, self.wk2),
                (image, self.wv2),
            ]
        )
        return out(self, joined(sdpa(q, k2, v2) + sdpa(q, k, v)))

    found = {role: members for role, *members in roles(detected(fn))}
    assert found["ATTN_KV"] == ["wk2", "wv2"]
    assert found["ATTN_OUT"] == ["wo"]


def test_one_projection_for_keys_and_values():
    def fn(self, x, text, image):
        k = heads(F.linear(text, self.wk))
        return out(self, joined(sdpa(queries(self, x), k, k)))

    assert roles(detected(fn)) == [("ATTN_Q", "wq"), ("ATTN_KV", "wk"), ("ATTN_OUT", "wo")]


def test_keys_and_values_of_two_queries():
    def fn(self, x, text, image):
        q, q2, k, v = (heads(F.linear(x, w)) for w in (self.wq, self.wk2, self.wk, self.wv))
        return out(self, joined(sdpa(q, k, v)) + joined(sdpa(q2, k, v)))

    assert roles(detected(fn)) == [("ATTN_QKV", "wq", "wk", "wv", "wk2"), ("ATTN_OUT", "wo")]

    def crossed(self, x, text, image):
        q, q2 = heads(F.linear(x, self.wq)), heads(F.linear(x + 1, self.wk2))
        return hear(self, q, text) + hear(self, q2, text)

    assert roles(detected(crossed)) == [
        ("ATTN_Q", "wq"),
        ("ATTN_KV", "wk", "wv"),
        ("ATTN_Q", "wk2"),
    ]


def test_projections_pass_norms_and_rotations():
    def fn(self, x, text, image):
        q = F.rms_norm(F.linear(x, self.wq), (CHANNELS,), self.bq)
        k = F.rms_norm(F.linear(x, self.wk), (CHANNELS,), self.bk)
        q, k = (heads(t) * torch.cos(text.sum()) + heads(t).flip(-1) for t in (q, k))
        return out(self, joined(sdpa(q, k, heads(F.linear(x, self.wv)))))

    assert roles(detected(fn)) == [("ATTN_QKV", "wq", "wk", "wv"), ("ATTN_OUT", "wo")]


# What must not match --------------------------------------------------------------------------


def k_and_v_from_different_values(self, x, text, image):
    k, v = heads(F.linear(text, self.wk)), heads(F.linear(image[:, :2], self.wv))
    return out(self, joined(sdpa(queries(self, x), k[:, :, :2], v)))


def three_branches(self, x, text, image):
    q = queries(self, x)
    total = hear(self, q, text) + hear(self, q, image, "2") + hear(self, q, text + 1, "3")
    return out(self, total)


def test_k_and_v_from_different_values_are_no_group():
    program = detected(k_and_v_from_different_values)
    assert roles(program) == [("ATTN_Q", "wq"), ("ATTN_OUT", "wo")]
    assert skips(program) == ["k and v are projected from different values"]


def test_three_attentions_of_one_query_are_no_text_and_image():
    program = detected(three_branches)
    assert roles(program) == [("ATTN_Q", "wq"), ("ATTN_OUT", "wo")]
    assert skips(program) == ["3 attentions share one query"]


def test_an_operand_of_two_projections_is_refused_and_the_rest_is_found():
    def fn(self, x, text, image):
        y = attend(self, x)
        q = heads(F.linear(y, self.wtext))
        mixed = heads(F.linear(y, self.wk2) + F.linear(text[:, :1], self.wk3))
        return joined(sdpa(q, mixed, heads(F.linear(y, self.wv2))))

    program = detected(fn)
    assert roles(program) == [("ATTN_QKV", "wq", "wk", "wv"), ("ATTN_OUT", "wo")]
    assert skips(program) == ["k comes from 2 linears, not from one"]


def gated(self, x, y):
    return out(self, y * torch.sigmoid(x))


def residual(self, x, y):
    return out(self, y + x)


def returned(self, x, y):
    return y


@pytest.mark.parametrize("after", [gated, residual, returned])
def test_a_linear_that_reads_more_than_attention_is_no_out_projection(after):
    def fn(self, x, text, image):
        q, k, v = (heads(F.linear(x, weight)) for weight in (self.wq, self.wk, self.wv))
        return after(self, x, joined(sdpa(q, k, v)))

    program = detected(fn)
    assert roles(program) == [("ATTN_QKV", "wq", "wk", "wv")]
    assert skips(program) == ["no linear reads the output"]
    assert program.attentions[0].out is None


def test_q_and_k_of_one_value_and_v_of_another_are_no_qkv():
    def fn(self, x, text, image):
        y = x + self.bq
        q, k = heads(F.linear(y, self.wq)), heads(F.linear(y, self.wk))
        return out(self, joined(sdpa(q, k, heads(F.linear(x, self.wv)))))

    assert Role.ATTN_QKV not in {group.role for group in detected(fn).groups}


def test_weights_used_in_two_attentions_are_two_sites():
    def fn(self, x, text, image):
        return attend(self, attend(self, x))

    assert roles(detected(fn)) == [
        ("ATTN_QKV", "wq", "wk", "wv"),
        ("ATTN_OUT", "wo"),
        ("ATTN_QKV", "wq#1", "wk#1", "wv#1"),
        ("ATTN_OUT", "wo#1"),
    ]


def no_attention(self, x):
    return F.linear(F.gelu(F.linear(x, self.wq)), self.wo)


def test_a_model_without_attention():
    program = before(exported(no_attention, X, wq=WEIGHTS["wq"], wo=WEIGHTS["wo"]), DetectAttention)
    with pytest.raises(DetectionError, match="holds no attention") as caught:
        run_pass(program, DetectAttention())
    assert caught.value.pass_name == "detect_attention"
    assert caught.value.site is None


def test_an_attention_without_projections():
    def fn(self, x):
        return F.linear(joined(sdpa(heads(x), heads(x), heads(x))), self.wo)

    program = before(exported(fn, X, wo=WEIGHTS["wo"]), DetectAttention)
    with pytest.raises(DetectionError, match="q comes from 0 linears") as caught:
        run_pass(program, DetectAttention())
    assert caught.value.site == "attention"
    assert "in forward" in caught.value.source
