"""No op and no step of training or decoding makes the host wait for a GPU, but for those that are listed here."""

import pytest
import torch

import fastpeft
from fastpeft.dispatch import override_plan
from tests.compiled import METHODS, adapted, stepped
from tests.host_sync import HostSync
from tests.models import batch
from tests.op_calls import OPS

pytestmark = pytest.mark.interpreter

MASK = "fastpeft/attention/masks.py mask_function"  # once a forward: whether there is padding, and on which side
PACKED = "fastpeft/calls.py packed_room_for"  # once a forward with position_ids and no mask: where sequences begin
FILLED = "fastpeft/tuners/prompt_call.py filled"  # whether a static cache has the prompt: where, and once in `generate`
ROUTED = "fastpeft/ops/_expert_lora_linear_torch.py segments"  # once a call: how many rows each expert has
MASKING = "fastpeft/rank_allocator.py allocate"  # once a step that takes triplets away

BY_MASK = ("prefix", "prefix-projection", "adapter")  # the methods whose attention is ours
BY_PROMPT = ("prompt", "p-tuning-mlp", "p-tuning-lstm")
INPUTS = {  # what a batch has, and what of it is read
    "mask": (lambda: batch(), dict.fromkeys(BY_MASK, {MASK: 1})),
    "none": (lambda: {"input_ids": batch()["input_ids"], "labels": batch()["labels"]}, {}),
    "positions": (
        lambda: {**INPUTS["none"][0](), "position_ids": torch.arange(9).expand(2, -1)},
        dict.fromkeys(BY_PROMPT, {PACKED: 1}),
    ),
}


@pytest.mark.parametrize(
    "read",
    [
        *(float, int, bool, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.nonzero),
        *(torch.unique, torch.argwhere, torch.masked_select, lambda x: x[x > 0], lambda x: x[x > 0].zero_()),
        lambda x: x.repeat_interleave(torch.ones(1, dtype=torch.long)),
        lambda x: x.to("meta"),
        lambda x: torch.equal(x, x),
    ],
    ids=lambda read: getattr(read, "__name__", ""),
)
def test_the_instrument_sees(read):
    arguments = (torch.ones(1), torch.ones(1, dtype=torch.bool))
    with HostSync(everywhere=True) as host:
        read(*arguments) if read is torch.masked_select else read(arguments[0])
    assert sum(host.found.values()) == 1
    with HostSync(everywhere=True) as host:
        torch.where(arguments[1], arguments[0] * 2, 0.0).sum()[None].expand(3).repeat_interleave(2)[torch.tensor([0])]
    assert not host.found


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_training(method):
    dropout = {METHODS[method][2]: 0.1} if METHODS[method][2] else {}
    model = adapted(method, **dropout)
    for name, (inputs, known) in INPUTS.items():
        with fastpeft.backend("triton"), HostSync() as host:
            stepped(model, model, inputs())
        assert dict(host.found) == known.get(method, {}), name


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_decoding(method):
    model = adapted(method).eval()
    ids, mask = batch()["input_ids"], torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    with fastpeft.backend("triton"):
        cache = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        with HostSync() as host:
            model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert not host.found


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "adapter"])
def test_generation_with_a_static_cache(method):
    model, steps = adapted(method).eval(), 4
    options = {"max_new_tokens": steps, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with fastpeft.backend("triton"), HostSync() as host:
        model.generate(batch()["input_ids"], attention_mask=torch.ones(2, 9, dtype=torch.long), **options)
    assert dict(host.found) == ({FILLED: 2 * (steps - 1)} if method == "prompt" else {})


def test_steps_of_adalora_s_schedule():
    model = adapted("adalora")
    found = []
    for step in range(5):
        stepped(model, model, batch())
        with HostSync() as host:
            fastpeft.update_and_allocate(model, step)
        found.append(dict(host.found))
    assert found == [{}, {}, {}, {MASKING: 1}, {MASKING: 1}]


@pytest.mark.parametrize("name", OPS)
def test_ops_forward_and_backward(name):
    op, tensors, options, plan = OPS[name]
    with fastpeft.backend("triton"), override_plan(plan), HostSync() as host:
        op(*tensors(), **options).square().sum().backward()
    assert dict(host.found) == ({ROUTED: 1} if name == "experts" else {})
