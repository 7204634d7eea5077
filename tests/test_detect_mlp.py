from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import Streams, before, run_pass, table
from small import CHANNELS, WEIGHTS, X, attend, tensors

from wancompile.export import export
from wancompile.ir.site import Site, Source
from wancompile.passes import DetectMlp

MORE = {
    **WEIGHTS,
    **tensors("w1", "b1", "w2", "b2", "w3", "gain", seed=4),
    "wide": torch.randn(20, CHANNELS, generator=torch.Generator().manual_seed(5)),
    "narrow": torch.randn(CHANNELS, 20, generator=torch.Generator().manual_seed(6)),
}
CALL = {"x": X, "text": X[:, :3] + 1, "image": X[:, :2] - 1}


def detected(fn):
    program = export(Streams(fn, **MORE), [CALL])
    return run_pass(before(program, DetectMlp), DetectMlp())


def mlps(program):
    return {
        group.role.name: group.members for group in program.groups if group.role.name[:3] == "FFN"
    }


def reasons(program):
    return {str(one.site): one.reason for one in program.ungrouped}


def block(self, x, text, image):
    y = attend(self, x)
    y = F.linear(F.gelu(F.linear(y, self.wide)), self.narrow)
    return F.linear(y, self.w3)


def test_up_and_down(golden):
    golden(table(detected(block)))


def plain(h):
    return F.gelu(h)


def tanh(h):
    return F.gelu(h, approximate="tanh")


def written_out(h):
    return 0.5 * h * (1 + torch.erf(h / 2**0.5))


def silu(h):
    return F.silu(h)


def relu(h):
    return F.relu(h)


def cast(h):
    return F.gelu(h.double()).to(h.dtype)


def with_layout(h):
    return F.gelu(h.unflatten(-1, (5, -1))).flatten(-2)


@pytest.mark.parametrize("activation", [plain, tanh, written_out, silu, relu, cast, with_layout])
def test_nothing_but_an_activation_between(activation):
    def fn(self, x, text, image):
        return F.linear(activation(F.linear(attend(self, x), self.wide)), self.narrow)

    assert mlps(detected(fn)) == {"FFN_UP": ("wide",), "FFN_DOWN": ("narrow",)}


def test_groups_come_in_execution_order():
    def fn(self, x, text, image):
        y = F.linear(F.gelu(F.linear(attend(self, x), self.wide)), self.narrow)
        q = F.linear(y, self.w1, self.b1)
        return F.scaled_dot_product_attention(q, F.linear(y, self.w2), F.linear(y, self.w3))

    assert [group.members for group in detected(fn).groups] == [
        ("wq", "wk", "wv"),
        ("wo",),
        ("wide",),
        ("narrow",),
        ("w1", "w2", "w3"),
    ]


def test_groups_of_one_value_have_one_producer():
    def fn(self, x, text, image):
        y = F.layer_norm(x, (CHANNELS,), self.gain)
        z = attend(self, y)
        return z + F.linear(F.gelu(F.linear(y + z - z, self.wide)), self.narrow)

    by_members = {group.members: group.producer for group in detected(fn).groups}
    assert by_members[("wq", "wk", "wv")] == Site("wq")
    assert by_members[("wide",)] == Site("wide")

    def shared(self, x, text, image):
        y = F.layer_norm(attend(self, x), (CHANNELS,))
        q, k, v = (F.linear(y, weight) for weight in (self.w1, self.w2, self.w3))
        z = F.scaled_dot_product_attention(q, k, v)
        return z + F.linear(F.gelu(F.linear(y, self.wide)), self.narrow)

    by_members = {group.members: group.producer for group in detected(shared).groups}
    assert by_members[("wide",)] == by_members[("w1", "w2", "w3")] == Site("w1")


def test_the_source_of_up_is_that_of_its_norm():
    def fn(self, x, text, image):
        y = F.layer_norm(attend(self, x), (CHANNELS,)) * (1 + self.gain) + self.b1
        return F.linear(F.gelu(F.linear(y, self.wide)), self.narrow)

    assert [group.source for group in detected(fn).groups][2:] == [
        Source.MODULATED_NORM,
        Source.ACTIVATION,
    ]


# What must not match --------------------------------------------------------------------------


def before_attention(self, x, text, image):
    return attend(self, F.linear(F.gelu(F.linear(x, self.wide)), self.narrow))


def beside_attention(self, x, text, image):
    return attend(self, x) + F.linear(F.gelu(F.linear(text, self.wide)), self.narrow)[:, :1]


def gated(self, x, text, image):
    y = attend(self, x)
    return F.linear(F.silu(F.linear(y, self.w1)) * F.linear(y, self.w2), self.w3)


def activation_read_twice(self, x, text, image):
    h = F.gelu(F.linear(attend(self, x), self.w1))
    return F.linear(h, self.w2) + h


def up_read_twice(self, x, text, image):
    h = F.linear(attend(self, x), self.w1)
    return F.linear(F.gelu(h), self.w2) + h


def dropped_bias(self, x, text, image):
    return F.linear(F.gelu(F.linear(attend(self, x), self.w1)) + self.gain, self.w2)


def no_activation(self, x, text, image):
    return F.linear(F.linear(attend(self, x), self.w1), self.w2)


EMBEDS = "lies before every attention: embeds "
STREAM = "reads the video stream, but is no projection of an attention and no part of an MLP"


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (before_attention, {"wide": f"{EMBEDS}x", "narrow": f"{EMBEDS}x"}),
        (beside_attention, {"wide": f"{EMBEDS}text", "narrow": f"{EMBEDS}text"}),
        (gated, dict.fromkeys(("w1", "w2", "w3"), STREAM)),
        (activation_read_twice, dict.fromkeys(("w1", "w2"), STREAM)),
        (up_read_twice, dict.fromkeys(("w1", "w2"), STREAM)),
        (dropped_bias, dict.fromkeys(("w1", "w2"), STREAM)),
        (no_activation, dict.fromkeys(("w1", "w2"), STREAM)),
    ],
)
def test_what_is_no_mlp_is_listed_with_a_reason(fn, expected):
    program = detected(fn)
    assert not mlps(program)
    assert reasons(program) == expected


def test_a_chain_of_three_is_one_pair_and_a_rest():
    def fn(self, x, text, image):
        h = F.gelu(F.linear(attend(self, x), self.w1))
        return F.linear(F.gelu(F.linear(h, self.w2)), self.w3)

    program = detected(fn)
    assert mlps(program) == {"FFN_UP": ("w1",), "FFN_DOWN": ("w2",)}
    assert reasons(program) == {"w3": STREAM}


def test_an_embedder_of_several_inputs_names_them():
    def fn(self, x, text, image):
        return attend(self, x + F.linear(text[:, :1] + image[:, :1], self.w1))

    assert reasons(detected(fn)) == {"w1": f"{EMBEDS}image, text"}


def test_a_projection_that_shares_nothing_says_of_which_attention():
    def fn(self, x, text, image):
        q, k = F.linear(x, self.w1), F.linear(text, self.w2)
        y = F.scaled_dot_product_attention(q, k, F.linear(text * 2, self.w3))
        return attend(self, y)

    found = reasons(detected(fn))
    assert set(found) == {"w2", "w3"}
    assert all("projects an operand of attention, but shares" in one for one in found.values())
