"""What depends on encoder states alone, split off: by dataflow, bit for bit."""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kit import Streams, counts
from small import CHANNELS, WEIGHTS, X, attend, heads, joined, normal, tensors
from traced import fixed

from wancompile import hoist, pipeline
from wancompile.errors import InputError
from wancompile.export import export
from wancompile.ir import text as printing
from wancompile.ir.levels import Level
from wancompile.passes import NORMALIZE
from wancompile.passes.hoist import TakeBody, TakePrologue
from wancompile.passes.steady import cut, steady_inputs

sdpa = F.scaled_dot_product_attention
ALL = WEIGHTS | tensors("wtext", "wq2", "wk2", "wv2", "gain", "wimage", "wk3", "wv3", seed=4)


def call(batch=2, tokens=5, seed=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": tokens, "text": 7, "image": 3}
    return {
        name: torch.randn(batch, rows, CHANNELS, generator=generator)
        for name, rows in shapes.items()
    }


def lowered(fn):
    """Return `fn(self, x, text, image)` as a program that counts as LOWERED: no op has a kernel."""
    program = export(Streams(fn, **ALL), [call(), call(3, 6)])
    return replace(pipeline.run(program, NORMALIZE), level=Level.LOWERED)


def split(program, inputs=None):
    found = hoist.find(program, inputs)
    assert found is not None
    return hoist.split(program, found.inputs)


def run(parts, inputs):
    tensors = list(inputs.values())
    return parts.body(*tensors, *parts.prologue(*(tensors[place] for place in parts.places)))


def assert_same(program, parts):
    for inputs in (call(), call(3, 6, seed=9), call(1, 11, seed=10)):
        torch.testing.assert_close(run(parts, inputs), program(**inputs), rtol=0, atol=0)


def cross(self, x, states, queries=None):
    """Attention of video to what is made of `states`."""
    k = F.rms_norm(F.linear(states, self.wk2), [CHANNELS], self.gain, 1e-6)
    q = F.linear(attend(self, x) if queries is None else queries, self.wq2)
    return joined(sdpa(heads(q), heads(k), heads(F.linear(states, self.wv2))))


def plain(self, x, text, image):
    return cross(self, x, F.gelu(F.linear(text, self.wtext)))


@pytest.fixture(scope="module")
def program():
    return lowered(plain)


@pytest.fixture(scope="module")
def parts(program):
    return split(program)


# What is split ----------------------------------------------------------------------------------


def test_keys_and_values_are_handed_over(golden, parts):
    golden(parts.prologue.print("canonical") + "\n" + parts.body.print("canonical"))


def test_the_parts_compute_the_same_bits_at_any_size(program, parts):
    assert_same(program, parts)


def test_each_part_has_its_own_weights(program, parts):
    prologue, body = set(parts.prologue.state), set(parts.body.state)
    assert prologue == {"wtext", "wk2", "wv2", "gain"}
    assert not prologue & body
    assert prologue | body == set(program.state)
    assert parts.prologue.nbytes + parts.body.nbytes == program.nbytes
    found = hoist.find(program)
    assert hoist.facts(program, found).weight_bytes == parts.prologue.nbytes


def test_the_prologue_takes_encoder_states_alone(program, parts):
    assert [spec.name for spec in parts.prologue.signature.inputs] == ["text"]
    assert parts.places == (1,)
    assert hoist.facts(program, hoist.find(program)).cached_bytes == 2 * 2 * 7 * CHANNELS * 4


def test_a_second_run_changes_nothing(parts):
    body = pipeline.run(parts.body, [TakeBody(("text",))])
    assert printing.render(body.graph) == printing.render(parts.body.graph)
    prologue = pipeline.run(parts.prologue, [TakePrologue(("text",))])
    assert printing.render(prologue.graph) == printing.render(parts.prologue.graph)


def test_the_parts_say_what_they_are(parts):
    (done,) = (parts.prologue.records[-1].done,)
    assert [note.text for note in done] == ["computed once for each prompt"] * 2
    assert parts.body.records[-1].name == "take_body"


# What stays the same ----------------------------------------------------------------------------


def test_text_and_image_states_are_found():
    def both(self, x, text, image):
        states = F.linear(image, self.wimage)
        k, v = (heads(F.linear(states, w)) for w in (self.wk3, self.wv3))
        return cross(self, x, text) + joined(sdpa(heads(F.linear(attend(self, x), self.wq2)), k, v))

    program = lowered(both)
    assert steady_inputs(program.graph, program.attentions) == ("text", "image")
    parts = split(program)
    assert len(parts.prologue.graph.output_node().args[0]) == 4
    assert_same(program, parts)
    only_image = split(program, ["image"])
    assert set(only_image.prologue.state) == {"wimage", "wk3", "wv3"}
    assert_same(program, only_image)


def test_what_meets_the_video_varies():
    """Keys of text and video together: only the linear before they meet is hoisted."""

    def mixed(self, x, text, image):
        return cross(self, x, F.linear(text, self.wtext) * x.mean(1, keepdim=True))

    program = lowered(mixed)
    assert steady_inputs(program.graph, program.attentions) == ("text",)
    parts = split(program)
    assert set(parts.prologue.state) == {"wtext"}
    assert_same(program, parts)


def test_self_attention_has_nothing_to_hoist():
    program = replace(normal(attend, X, **WEIGHTS), level=Level.LOWERED)
    assert steady_inputs(program.graph, program.attentions) == ()
    assert hoist.find(program) is None


def test_states_that_are_read_as_they_are_need_no_cache():
    def bare(self, x, text, image):
        q, k, v = (F.linear(attend(self, x), w) for w in (self.wq2, self.wk2, self.wv2))
        return joined(sdpa(heads(q), heads(k), heads(v))) + text.permute(0, 2, 1)[:, :, :1].mean()

    program = lowered(bare)
    assert hoist.find(program) is None
    assert hoist.find(program, ["image"]) is None
    # A slice may be much smaller than what it is cut from; the mean of it is one number.
    found = hoist.find(program, ["text"])
    assert [node.target._opname for node in found.kept] == ["mean"]


def test_an_unknown_input_is_named(program):
    with pytest.raises(InputError, match="no input 'prompt'; there are x, text"):
        hoist.find(program, ["prompt"])
    with pytest.raises(InputError, match="some input must vary"):
        hoist.find(program, ["x", "text", "image"])


# Where it is cut --------------------------------------------------------------------------------


def test_what_both_read_stays_with_both():
    def shared(self, x, text, image):
        return cross(self, F.linear(x, self.wtext), F.linear(text, self.wtext))

    program = lowered(shared)
    parts = split(program)
    assert "wtext" in parts.prologue.state
    assert "wtext" in parts.body.state
    assert hoist.find(program).weights == {"wk2", "wv2", "gain"}
    assert_same(program, parts)


def test_a_size_of_the_video_that_the_text_has_too_is_asked_of_the_text():
    def sized(self, x, text, image):
        return cross(self, x, torch.ones(x.shape[0], 1, 1) * F.linear(text, self.wtext))

    program = lowered(sized)
    parts = split(program)
    assert set(parts.prologue.state) == {"wtext", "wk2", "wv2", "gain"}
    assert_same(program, parts)


def test_a_size_of_the_video_alone_varies():
    """As many keys as there are video tokens: what is repeated is kept, not the repetition."""

    def sized(self, x, text, image):
        return cross(self, x, F.linear(text[:, :1], self.wtext).repeat(1, x.shape[1], 1))

    program = lowered(sized)
    parts = split(program)
    assert set(parts.prologue.state) == {"wtext"}
    assert "repeat" in counts(parts.body)
    assert "repeat" not in counts(parts.prologue)
    assert_same(program, parts)


def test_sizes_of_what_is_hoisted_do_not_bring_it_back():
    def sized(self, x, text, image):
        states = F.linear(text, self.wtext)
        return cross(self, x, states) * states.shape[0]

    program = lowered(sized)
    parts = split(program)
    assert "wtext" not in parts.body.state
    assert_same(program, parts)


def test_casts_that_widen_are_made_again():
    def wide(self, x, text, image):
        states = F.linear(text, self.wtext).to(torch.bfloat16)
        return attend(self, x) + states.float().mean(1, keepdim=True).to(torch.bfloat16).float()

    program = lowered(wide)
    parts = split(program, ["text"])
    assert [spec.dtype for spec in parts.body.signature.inputs[3:]] == [torch.bfloat16]
    assert_same(program, parts)


def test_one_value_in_two_layouts_is_kept_once():
    def summed(self, x, text, image):
        states = F.linear(text, self.wtext)
        y = attend(self, x)
        return y @ states.permute(0, 2, 1) @ states

    program = lowered(summed)
    parts = split(program, ["text"])
    assert len(parts.body.signature.inputs) == 4
    assert_same(program, parts)


def test_what_the_caller_gets_is_not_kept():
    """It could be written to."""

    def returned(self, x, text, image):
        states = F.linear(text, self.wtext)
        k = F.linear(states, self.wk2)
        y = joined(sdpa(heads(attend(self, x)), heads(k), heads(k)))
        return y, k.permute(0, 2, 1)

    program = lowered(returned)
    parts = split(program)
    assert set(parts.prologue.state) == {"wtext"}
    assert_same(program, parts)


# Cost -------------------------------------------------------------------------------------------


def test_the_cut_is_linear_in_blocks():
    def calls(layers):
        program = fixed("i2v", layers)
        profile = cProfile.Profile()
        profile.enable()
        cut(program.graph, steady_inputs(program.graph, program.attentions))
        profile.disable()
        return pstats.Stats(profile).total_calls

    calls(1)  # what is cached at the first use is not counted
    few, some, many = (calls(layers) for layers in (1, 2, 4))
    assert many - some < 2.1 * (some - few)
