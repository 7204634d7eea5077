from __future__ import annotations

import torch
import torch.nn.functional as F
from kit import counts, error, exported, normalized, run_pass

from wancompile.passes import DropNoops


def _noisy(self, x):
    y = F.dropout(x.float().contiguous().clone(), 0.3, training=False)
    z = F.dropout(y, 0.0, training=True)
    return z.to(torch.float32).type_as(x) * self.w


def test_everything_idle_goes(golden):
    x, w = torch.randn(2, 3, 4), torch.randn(4)
    program = normalized(_noisy, x, DropNoops(), w=w)
    golden(program.print("canonical"))
    assert counts(program) == {"mul": 1}
    assert error(program, _noisy, x, w=w) < 1e-6


def test_real_casts_stay():
    def fn(self, x):
        return x.to(torch.bfloat16).float() + self.w

    x, w = torch.randn(2, 3, 4), torch.randn(4)
    program = normalized(fn, x, DropNoops(), w=w)
    assert counts(program)["to"] == 2
    assert torch.equal(program(x=x), x.to(torch.bfloat16).float() + w)


def test_a_live_dropout_stays():
    def fn(self, x):
        return torch.ops.aten.dropout(x, 0.5, True) * self.w

    program = exported(fn, torch.randn(2, 3, 4), w=torch.ones(4))
    assert counts(run_pass(program, DropNoops()))["dropout"] == 1
