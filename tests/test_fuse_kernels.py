"""`fuse` on the kernels, in the interpreter: whole models are as HF peft's beside them, and a layer is as many launches
as its ops have passes."""

from collections import Counter

import pytest
import torch

import fastpeft
from fastpeft.dispatch import Plan, backend, override_plan
from tests.models import batch, tiny
from tests.peft_pair import assert_same_step, patched_pair, quietly, randomise
from tests.traffic import SUMS, count_traffic

pytestmark = pytest.mark.interpreter

NAMES = {"alone": (), "projections": ("projections",), "all": ("projections", "mlp")}
FORWARD = {  # of a Llama layer with LoRA on its seven projections: S of each input, and S Bᵀ of each output
    "alone": {"_shrink_kernel": 7, "_tail_kernel": 7},
    # q, k, v have one pass for all S, and gate, up another; o and down have their own.
    "projections": {"_shrink_all_kernel": 2, "_shrink_kernel": 2, "_tail_kernel": 7},
    # down's S comes from the pass that makes act(gate)·up.
    "all": {"_shrink_all_kernel": 2, "_shrink_kernel": 1, "_gated_forward_kernel": 1, "_tail_kernel": 7},
}
BACKWARD = {  # dB and T of each output's gradient in one pass, dA of each input
    "alone": {"_grad_b_and_t_kernel": 7, "_grad_columns_kernel": 7},
    "projections": {"_grad_b_and_t_kernel": 7, "_grad_all_columns_kernel": 2, "_grad_columns_kernel": 2},
    # One pass makes dgate and dup with T and dB of both, and down's dA.
    "all": {
        "_grad_b_and_t_kernel": 5, "_gated_backward_kernel": 1, "_grad_all_columns_kernel": 2,
        "_grad_columns_kernel": 1,
    },
}  # fmt: skip
TAILS = {  # of backward: T A, by strategy
    # The interpreter's: T A in one kernel with the base product, which the MLP's op has from the vendor.
    "fused": {"alone": {"_tail_kernel": 7}, "projections": {"_tail_kernel": 7}, "all": {"_tail_kernel": 4}},
    # Predicted for GPUs and more than a few rows: the pass that makes dA writes T A too, onto which the vendor's
    # product accumulates; beside the dA of three projections registers do not suffice for it.
    "prewrite": {"alone": {}, "projections": {"_tail_all_kernel": 1}, "all": {"_tail_all_kernel": 1}},
}
# Without what adds up partial results.
TOTALS = {
    "fused": {"alone": 35, "projections": 29, "all": 24},
    "prewrite": {"alone": 28, "projections": 23, "all": 21},
}
LENGTHS = {"few rows": 4, "more rows": 40}
# What adds it up, forward and backward: all that a pass makes in one launch, and dB and T of all outputs of one input.
# Few rows are shared by several programs where the input is wide (down's S); a dA of few rows one program has whole.
PARTIAL = {
    "few rows": {"alone": (1, 7), "projections": (1, 4), "all": (1, 4)},
    "more rows": {"alone": (0, 7 + 7), "projections": (0, 4 + 4), "all": (1, 4 + 3)},
}


def launches(fused: str, layers: int, length: int) -> tuple[Counter, Counter]:
    """By kernel, of forward and of backward in a step of a model that has been called once."""
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05)
    model = quietly(fastpeft.patch, tiny("llama", dtype=torch.float16, layers=layers), config, backend="triton")
    inputs = batch(rows=1, length=length)
    if fused != "alone":
        fastpeft.fuse(model, *NAMES[fused])
        with torch.no_grad():
            model(**inputs)
    with count_traffic() as forward:
        loss = model.train()(**inputs).loss
    with count_traffic() as backward:
        loss.backward()
    return Counter(forward.kernels()), Counter(backward.kernels())


@pytest.mark.parametrize("fused", NAMES)
@pytest.mark.parametrize("strategy", TAILS)
@pytest.mark.parametrize("length", LENGTHS)
def test_launches_of_a_layer(length, strategy, fused):
    """The second of two, whose input wants a gradient: what two layers launch beyond one."""
    with override_plan(Plan(strategy, strategy, "a test")):
        one, two = (launches(fused, layers, LENGTHS[length]) for layers in (1, 2))
    forward, backward = (after - before for before, after in zip(one, two, strict=True))
    sums = tuple(sum(each.pop(name, 0) for name in SUMS) for each in (forward, backward))
    assert (forward, backward) == (FORWARD[fused], BACKWARD[fused] | TAILS[strategy][fused])
    assert sums == PARTIAL[length][fused]
    assert (forward + backward).total() == TOTALS[strategy][fused]


def assert_fused(kernels: list[str], calls: int, backwards: int, layers: int) -> None:
    """In every layer q, k, v and gate, up read their input once, and the MLP is one op."""
    found = Counter(kernels)
    assert found["_shrink_all_kernel"] == 2 * calls * layers and found["_gated_forward_kernel"] == calls * layers
    assert found["_grad_all_columns_kernel"] == 2 * backwards * layers
    assert found["_gated_backward_kernel"] == backwards * layers


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_a_family_is_as_in_peft(family, recompute):
    hf, model = patched_pair(family, {"target_modules": "all-linear"})
    randomise(hf, model)
    fastpeft.fuse(model, recompute=recompute)
    with backend("triton"):
        with torch.no_grad():
            model(**batch())
        with count_traffic() as traffic:
            assert_same_step(hf, model, batch())
    assert_fused(traffic.kernels(), calls=2, backwards=1, layers=2)


def test_losses_of_twenty_steps_are_peft_s():
    hf, model = patched_pair("llama", {"target_modules": "all-linear"})
    randomise(hf, model)
    fastpeft.fuse(model)
    found, inputs = [], batch()
    with backend("triton"), count_traffic() as traffic:
        with torch.no_grad():
            model(**inputs)
        before = len(traffic.launches)
        for each in (hf, model):
            learned = [parameter for _, parameter in sorted(each.named_parameters()) if parameter.requires_grad]
            optimiser, losses = torch.optim.AdamW(learned, lr=1e-3), []
            for _ in range(20):
                optimiser.zero_grad()
                loss = each(**inputs).loss
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
            found.append(torch.stack(losses))
    assert_fused(traffic.kernels()[before:], calls=20, backwards=20, layers=2)
    assert (found[1] - found[0]).abs().max() <= 1e-5 * found[0].abs().max()
    assert found[1][-1] < found[1][0]
