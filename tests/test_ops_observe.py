"""The observers: maxima per label, and a sample that does not depend on how rows are batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wancompile import ops
from wancompile.errors import InputError


class Buffers:
    """What one observed tensor writes to: `labels` lines, `size` sampled rows of `channels`."""

    def __init__(self, channels: int, labels: int = 2, size: int = 8) -> None:
        self.amax = torch.zeros(labels, channels)
        self.count = torch.zeros(labels, dtype=torch.int64)
        self.sample = torch.zeros(size, channels)
        self.priority = torch.full((size,), torch.inf, dtype=torch.float64)

    def watch(self, x: Tensor, label: int = 0, seed: int = 0) -> "Buffers":
        buffers = self.amax, self.count, self.sample, self.priority
        ops.observe_channels(x, *buffers, torch.tensor(label), seed)
        return self

    def rows(self) -> Tensor:
        return self.sample[self.priority.isfinite()]


def bounds(*shape: int) -> tuple[Tensor, Tensor]:
    """The range of nothing."""
    return torch.full(shape, torch.inf), torch.full(shape, -torch.inf)


def test_observers_are_good_library_ops():
    b = Buffers(5)
    args = (torch.randn(2, 3, 5), b.amax, b.count, b.sample, b.priority, torch.tensor(1), 7)
    torch.library.opcheck(ops.observe_channels, args)
    for size, is_turned in ((5, False), (8, True)):
        heads = torch.randn(2, 3, 4, size), *bounds(2, 3, size), torch.tensor(1), is_turned
        torch.library.opcheck(ops.observe_heads, heads)


@pytest.mark.parametrize("op", [ops.observe_channels, ops.observe_heads])
def test_dead_code_elimination_keeps_observers(op):
    graph = torch.fx.Graph()
    node = graph.call_function(op._opoverload, (graph.placeholder("x"),))
    graph.output(())
    graph.eliminate_dead_code()
    assert node.is_impure()
    assert node in graph.nodes


def test_amax_is_kept_per_label_and_channel():
    x, y = torch.randn(2, 6, 5), torch.randn(3, 5)
    b = Buffers(5, labels=3).watch(x, 2).watch(y, 2).watch(x * 9, 0)
    both = torch.cat([x.reshape(-1, 5), y])
    assert torch.equal(b.amax[2], both.abs().amax(0))
    assert torch.equal(b.amax[0], (9 * x).abs().amax((0, 1)))
    assert not b.amax[1].any()
    assert b.count.tolist() == [12, 0, 15]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_amax(broken):
    x = torch.ones(4, 3)
    x[2, 1] = -broken
    b = Buffers(3).watch(x).watch(torch.ones(4, 3))
    assert b.amax[0].isfinite().tolist() == [True, False, True]
    low, high = bounds(1, 2, 3)
    for value in (x.reshape(1, 2, 2, 3), torch.ones(1, 2, 2, 3)):
        ops.observe_heads(value, low, high, torch.tensor(0), False)
    both = low[0].isfinite() & high[0].isfinite()
    assert both.tolist() == [[True] * 3, [True, False, True]]


def test_padding_counts_once_in_each_batch_element():
    words, padding = torch.randn(2, 3, 4), torch.zeros(2, 500, 4)
    b = Buffers(4, size=64).watch(torch.cat([words, padding], 1))
    assert b.count.tolist() == [8, 0]
    assert len(b.rows()) == 8
    assert (b.rows() == 0).all(1).sum() == 2
    same = Buffers(4).watch(torch.full((2, 9, 4), -3.0))
    assert same.count.tolist() == [2, 0]
    assert same.amax[0].tolist() == [3.0] * 4


def test_rows_that_come_back_later_count_again():
    a, b = torch.randn(2, 1, 4)
    assert Buffers(4).watch(torch.cat([a, b, a, a])).count[0] == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=40)
def test_sample_does_not_depend_on_the_batches(sizes, seed):
    x = torch.arange(float(sum(sizes)))[:, None].expand(-1, 3).contiguous()
    whole, parts = Buffers(3).watch(x, seed=seed), Buffers(3)
    for number, part in enumerate(x.split(sizes)):
        parts.watch(part, label=number % 2, seed=seed)
    assert torch.equal(whole.priority, parts.priority)
    assert torch.equal(whole.rows(), parts.rows())
    assert len(whole.rows()) == min(8, len(x))
    assert whole.count.sum() == parts.count.sum()


def test_samples_merge_into_the_smallest_of_both():
    x, y = torch.randn(50, 3), torch.randn(70, 3)
    one, two = Buffers(3).watch(x, seed=1), Buffers(3).watch(y, seed=2)
    large = Buffers(3, size=50).watch(x, seed=1), Buffers(3, size=70).watch(y, seed=2)
    merged = torch.cat([one.priority, two.priority]).topk(8, largest=False)
    everything = torch.cat([b.priority for b in large]).topk(8, largest=False)
    assert torch.equal(merged.values, everything.values)
    rows = torch.cat([one.sample, two.sample])[merged.indices]
    assert torch.equal(rows, torch.cat([b.sample for b in large])[everything.indices])


def test_sample_is_uniform_over_the_stream():
    picks = torch.zeros(64)
    x = torch.arange(64.0)[:, None]
    for seed in range(2000):
        picks[Buffers(1).watch(x, seed=seed).rows().long()] += 1
    # 2000 * 8 / 64 = 250 expected, standard deviation 14.8
    assert (picks - 250).abs().max() < 75
    assert abs(picks[:32].sum() / picks.sum() - 0.5) < 0.02


def test_priorities_are_unrelated_to_the_rows_and_to_other_seeds():
    x = torch.arange(4096.0)[:, None]
    zero, one = (Buffers(1, size=4096).watch(x, seed=seed) for seed in (0, 1))
    assert len(torch.cat([zero.priority, one.priority]).unique()) == 2 * 4096
    assert zero.priority.min() >= 0
    assert zero.priority.max() < 1
    orders = torch.stack([x[:, 0], zero.sample[:, 0].argsort().float(), one.sample[:, 0]])
    assert (torch.corrcoef(orders) - torch.eye(3)).abs().max() < 0.08  # 5 standard deviations
    ranks = torch.stack([b.sample[:, 0].argsort().float() for b in (zero, one)])
    assert torch.corrcoef(ranks)[0, 1].abs() < 0.08


def test_fewer_rows_than_slots_leave_slots_empty():
    b = Buffers(3, size=8).watch(torch.randn(2, 3)).watch(torch.randn(3))
    assert b.priority.isfinite().sum() == 3
    assert b.priority[3:].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rows_are_sampled_as_they_are(dtype):
    x = torch.randn(5, 3).to(dtype)
    b = Buffers(3).watch(x)
    assert torch.equal(b.rows().sort(0).values, x.float().sort(0).values)
    assert torch.equal(b.amax[0], x.abs().amax(0).float())


def test_observe_heads_keeps_the_range_per_head_and_channel():
    x = torch.randn(2, 3, 5, 4).transpose(2, 3) + 3
    low, high = bounds(4, 3, 5)
    ops.observe_heads(x, low, high, torch.tensor(1), False)
    ops.observe_heads(x / 2, low, high, torch.tensor(1), False)
    both = torch.cat([x, x / 2])
    assert torch.equal(high[1], both.amax((0, 2)))
    assert torch.equal(low[1], both.amin((0, 2)))
    assert not low[[0, 2, 3]].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observe_heads_measures_in_the_turned_basis(dtype):
    x, matrix = torch.randn(2, 3, 5, 4).to(dtype), torch.tensor([[1.0, 1], [1, -1]])
    low, high = bounds(1, 3, 4)
    ops.observe_heads(x, low, high, torch.tensor(0), True)
    turned = x.double() @ torch.kron(matrix, matrix).double() / 2
    torch.testing.assert_close(high[0], turned.amax((0, 2)).float())
    torch.testing.assert_close(low[0], turned.amin((0, 2)).float())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_rows_are_compared_to_the_last_bit(channels, dtype, start):
    """Whatever their width, their type and their place in memory."""
    distinct = torch.arange(1, 7, dtype=dtype)[:, None].repeat(1, channels)
    distinct[3] = distinct[2]
    distinct[3, -1] += 0.5  # the rows differ in their last channel alone
    flat = torch.cat([torch.zeros(start, dtype=dtype), distinct.repeat_interleave(3, 0).flatten()])
    rows = flat[start:].view(2, 9, channels)
    for x in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        b = Buffers(channels).watch(x)
        assert b.count.tolist() == [6, 0]
        assert b.rows().unique(dim=0).tolist() == distinct.float().unique(dim=0).tolist()


class Counting(TorchDispatchMode):
    """Counts the ops that compute something, and those among them that read `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.ops, self.passes = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.ops += 1
            read = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
            picks_rows = func is torch.ops.aten.index_select.default
            self.passes += not picks_rows and any(one.nbytes >= self.size for one in read)
        return func(*args, **(kwargs or {}))


def test_an_observer_passes_over_memory_three_times_and_launches_little():
    """The smallest and the largest values, and each row beside the one before it."""
    x = torch.randn(1, 512, 64)
    b = Buffers(64, size=16)
    with Counting(x.nbytes * 9 // 10) as seen:
        body = ops.observe_channels._init_fn
        body(x, b.amax, b.count, b.sample, b.priority, torch.tensor(0), 7)
    assert seen.passes == 3
    assert seen.ops <= 46
    heads = torch.randn(1, 4, 99, 16)
    with Counting(heads.nbytes) as seen:
        ops.observe_heads._init_fn(heads, *bounds(2, 4, 16), torch.tensor(0), False)
    assert seen.passes == 2
    assert seen.ops <= 12


def test_the_host_never_waits():
    """Fake tensors have no numbers: whoever asks for one is an error."""
    with FakeTensorMode():
        b = Buffers(6)
        line = torch.zeros((), dtype=torch.int64)
        buffers = b.amax, b.count, b.sample, b.priority
        ops.observe_channels._init_fn(torch.randn(2, 9, 6), *buffers, line, 7)
        ops.observe_heads._init_fn(torch.randn(1, 2, 3, 4), *bounds(2, 2, 4), line, True)
        with pytest.raises(DataDependentOutputException):
            float(b.amax.sum())


def test_buffers_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="observe_channels needs"):
        Buffers(4).watch(torch.randn(2, 3))
    with pytest.raises(InputError, match="observe_heads needs"):
        ops.observe_heads(torch.randn(1, 2, 3, 4), *bounds(2, 3), torch.tensor(0), False)
    with pytest.raises(InputError, match="D a power of two"):
        ops.observe_heads(torch.randn(1, 2, 3, 6), *bounds(1, 2, 6), torch.tensor(0), True)
