"""The cache of prompts: the same tensors, unchanged, are found again; anything else is not."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

from wancompile.prompts import PromptCache


def prompt(fill=0.0, batch=2):
    return torch.full((batch, 3, 4), fill)


def keep(cache, *inputs):
    """Keep something new for `inputs` as a caller does, and return it."""
    assert cache.find(inputs) is None
    return cache.keep(inputs, [torch.randn(5)])


def test_the_same_tensor_is_found():
    cache, text = PromptCache(2), prompt()
    kept = keep(cache, text)
    assert cache.find([text]) is kept
    assert (cache.hits, cache.misses) == (1, 1)


def test_an_equal_tensor_is_another_one():
    cache, text = PromptCache(2), prompt()
    keep(cache, text)
    assert cache.find([text.clone()]) is None
    assert cache.find([text.view(2, 3, 4)]) is None


def test_all_tensors_have_to_be_the_same():
    cache, text, image = PromptCache(2), prompt(), prompt(1)
    kept = keep(cache, text, image)
    assert cache.find([image, text]) is None
    assert cache.find([text, prompt(1)]) is None
    assert cache.find([text, image]) is kept


def test_what_was_written_to_is_new():
    cache, text = PromptCache(2), prompt()
    keep(cache, text)
    text.mul_(2)
    assert cache.find([text]) is None
    assert not len(cache)
    again = keep(cache, text)
    text[0, 0] = 1  # through a view
    assert cache.find([text]) is None
    assert keep(cache, text) is not again


@pytest.mark.parametrize(
    "data", [prompt(1), prompt(0, batch=3), prompt(0).mT.contiguous().mT], ids=str
)
def test_other_numbers_behind_the_same_tensor_are_seen(data):
    """`data` can be exchanged without being counted as a write."""
    cache, text = PromptCache(2), prompt()
    keep(cache, text)
    text.data = data
    assert cache.find([text]) is None


def test_the_oldest_goes():
    cache, (a, b, c) = PromptCache(2), map(prompt, range(3))
    first, second = keep(cache, a), keep(cache, b)
    assert cache.find([a]) is first  # now b is the oldest
    third = keep(cache, c)
    assert cache.find([b]) is None
    assert [cache.find([one]) for one in (c,)] == [third]
    assert len(cache) <= 2
    assert second is not third


def test_two_prompts_may_take_turns():
    cache, a, b = PromptCache(2), prompt(), prompt(1)
    first, second = keep(cache, a), keep(cache, b)
    for _ in range(5):
        assert cache.find([a]) is first
        assert cache.find([b]) is second
    assert cache.misses == 2


def test_room_is_made_before_it_is_needed():
    """Or memory would hold one prompt more than was asked for."""
    cache, a, b = PromptCache(1), prompt(), prompt(1)
    (kept,) = keep(cache, a)
    gone = weakref.ref(kept)
    del kept
    assert cache.find([b]) is None
    assert gone() is None


def test_values_go_with_their_prompt():
    cache, a, b = PromptCache(2), prompt(), prompt(1)
    keep(cache, a)
    keep(cache, b)
    del a
    gc.collect()
    cache.find([b])
    assert len(cache) == 1
    assert cache.nbytes == 5 * 4


def test_a_cut_does_not_hold_on_to_the_whole():
    cache, text, whole = PromptCache(2), prompt(), torch.randn(6, 100)
    values = [whole[:, :2], whole.T]
    small, same = cache.keep([text], values)
    assert small.untyped_storage().nbytes() == small.nbytes == cache.nbytes - same.nbytes
    assert torch.equal(small, whole[:, :2])
    assert same.data_ptr() == whole.data_ptr()
    assert values[0] is small  # the list of the caller does not, either


def test_inference_tensors_are_not_kept(caplog):
    with torch.inference_mode():
        text = prompt()
    cache = PromptCache(2)
    with caplog.at_level(logging.WARNING, "wancompile"):
        for _ in range(3):
            keep(cache, text)
    assert not len(cache)
    assert len(caplog.records) == 1
    assert "inference mode" in caplog.text
