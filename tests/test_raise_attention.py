from __future__ import annotations

import pytest
import torch
from kit import counts, error, normalized

from wancompile.passes import RaiseAttention

X = torch.randn(2, 5, 12)
W = torch.randn(4) * 2


def heads(self, x):
    q = x.reshape(x.shape[0], -1, 3, 4).permute(0, 2, 1, 3)
    return q * self.w, q + 1, q - 1


def scaled_scores(self, x):
    q, k, v = heads(self, x)
    return torch.softmax((q @ k.transpose(-2, -1)) * 0.25, dim=-1) @ v


def divided_fp32_softmax(self, x):
    q, k, v = heads(self, x)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / 4.0
    return torch.matmul(scores.float().softmax(-1).to(v.dtype), v)


def batched_3d(self, x):
    q, k, v = (t.flatten(0, 1) for t in heads(self, x))
    return torch.bmm(torch.softmax(0.25 * torch.bmm(q, k.mT), -1), v)


def unscaled(self, x):
    q, k, v = heads(self, x)
    return torch.softmax(q * 0.25 @ k.mT, -1) @ v


def test_matmul_softmax_matmul(golden):
    program = normalized(scaled_scores, X, RaiseAttention(), w=W)
    golden(program.print("canonical"))


@pytest.mark.parametrize("fn", [scaled_scores, divided_fp32_softmax, batched_3d, unscaled])
def test_every_spelling(fn):
    program = normalized(fn, X, RaiseAttention(), w=W)
    assert counts(program)["scaled_dot_product_attention"] == 1
    assert not {"softmax", "matmul", "bmm"} & set(counts(program))
    assert error(program, fn, torch.randn(3, 7, 12), w=W) < 1e-5


def masked(self, x):
    q, k, v = heads(self, x)
    scores = (q @ k.mT) + self.w[0]
    return torch.softmax(scores, -1) @ v


def softmax_over_queries(self, x):
    q, k, v = heads(self, x)
    return torch.softmax(q @ k.mT, -2) @ v


def probabilities_returned(self, x):
    q, k, v = heads(self, x)
    p = torch.softmax(q @ k.mT, -1)
    return p @ v, p


@pytest.mark.parametrize("fn", [masked, softmax_over_queries, probabilities_returned])
def test_what_is_no_plain_attention_stays(fn):
    program = normalized(fn, X, RaiseAttention(), w=W)
    assert "scaled_dot_product_attention" not in counts(program)


def test_the_reason_for_staying_is_given():
    program = normalized(masked, X, RaiseAttention(), w=W)
    assert "not a plain, scaled product" in program.records[-1].skipped[0].text


def baddbmm_without_addend(self, x):
    q, k, v = (t.flatten(0, 1) for t in heads(self, x))
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.25) * 2
    return torch.bmm(torch.softmax(scores, -1), v)


def test_a_product_that_ignores_its_addend():
    program = normalized(baddbmm_without_addend, X, RaiseAttention(), w=W)
    assert "scaled_dot_product_attention" in counts(program)
    assert error(program, baddbmm_without_addend, torch.randn(3, 7, 12), w=W) < 1e-5


def with_addend(self, x):
    q, k, v = (t.flatten(0, 1) for t in heads(self, x))
    scores = torch.baddbmm(torch.ones(1, 1, k.shape[1]), q, k.mT, alpha=0.25)
    return torch.bmm(torch.softmax(scores, -1), v)


def test_an_addend_is_kept():
    program = normalized(with_addend, X, RaiseAttention(), w=W)
    assert "scaled_dot_product_attention" not in counts(program)


def test_a_softmax_over_queries_is_reported():
    program = normalized(softmax_over_queries, X, RaiseAttention(), w=W)
    assert program.records[-1].skipped[0].text == "it is not over the last dimension"
