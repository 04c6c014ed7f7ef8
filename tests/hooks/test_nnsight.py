"""Reads and patches equal those of nnsight, which works another way (it runs the caller's code beside the forward)."""

import pytest
import torch

from midstream.hooks import read, sites, write
from midstream.zoo import tiny

nnsight = pytest.importorskip("nnsight", reason="a held-out reference of the bench extra")


@pytest.fixture(params=["gpt2", "llama", "gemma3"])
def model(request):
    return tiny.build(request.param)


@torch.no_grad()
def test_reads_equal_nnsights(model):
    inputs = tiny.inputs(model)
    with read(model) as out:
        ours = model(**inputs).logits
    wrapped = nnsight.NNsight(model)
    blocks = _blocks(wrapped, model)
    with wrapped.trace(**inputs):
        first = blocks[0].output.save()
        third = blocks[2].output.save()
        logits = wrapped.output.logits.save()
    assert torch.equal(out[0], first)
    assert torch.equal(out[2], third)
    assert torch.equal(ours, logits)


@torch.no_grad()
def test_patches_equal_nnsights(model):
    inputs = tiny.inputs(model)
    direction = torch.linspace(-1, 1, 32)
    with write(model, {("out", 1): lambda x, at: x + direction}):
        ours = model(**inputs).logits
    wrapped = nnsight.NNsight(model)
    blocks = _blocks(wrapped, model)
    with wrapped.trace(**inputs):
        blocks[1].output = blocks[1].output + direction
        logits = wrapped.output.logits.save()
    assert torch.equal(ours, logits)


@torch.no_grad()
def test_both_work_on_one_model_at_once(model):
    inputs = tiny.inputs(model)
    wrapped = nnsight.NNsight(model)
    blocks = _blocks(wrapped, model)
    with read(model) as out, wrapped.trace(**inputs):
        second = blocks[1].output.save()
    assert torch.equal(out[1], second)


def _blocks(wrapped, model):
    column = sites(model).stack()
    for name in column.parent.split("."):
        wrapped = getattr(wrapped, name)
    return wrapped
