"""The designs' ledgers against the bytes that the kernels move in the interpreter, and against what cannot be avoided.

In one tile, of one sample, head and processor, nothing is read again: then the bytes are the ledger's, kernel by
kernel. In several the ledger is a lower bound.
"""

from collections import Counter

import pytest
import torch

from benchmarks import designs
from fastpeft import cost
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import lora_gemm
from fastpeft.kernels import lora_linear as lora_kernels
from fastpeft.kernels import prefix_attention as attention_kernels
from fastpeft.kernels._tiles import FUSED_TAIL_RANK
from fastpeft.ops import (
    _lora_linear_triton,
    _rooms,
    gated_prompt_attention,
    lora_linear,
    prefix_attention,
    prompt_embedding,
)
from fastpeft.ops.dora_linear import apply_dora
from fastpeft.ops.row_norms import row_norms
from tests.traffic import SUMS, count_traffic

interpreter = pytest.mark.interpreter


@pytest.fixture
def one_processor(monkeypatch):
    for module in (lora_kernels, lora_gemm, attention_kernels):
        monkeypatch.setattr(module, "processor_count", lambda tensor: 1)


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape, dtype=torch.float32).to(dtype).requires_grad_()


def counted(traffic) -> Counter:
    found = Counter()
    for launch in traffic.launches:
        if launch.kernel not in SUMS:  # partial sums are no part of a ledger
            found[launch.kernel] += launch.loads.total() + launch.stores.total()
    return found


def ledger(launches) -> Counter:
    """Bytes of each kernel of ours; what follows a colon says only which of its launches is meant."""
    found = Counter()
    for launch in launches:
        if launch.kernel.endswith("_kernel") or ": " in launch.kernel:
            found[launch.kernel.split(":")[0]] += launch.work.bytes
    return found


def run_lora(strategy, M, K, N, r, dropout):
    """fp32, in which partial sums and results are of one size."""
    x, weight, a, b = (draw(*shape, dtype=torch.float32) for shape in ((M, K), (N, K), (r, K), (N, r)))
    weight.requires_grad_(False)
    if strategy == "rehomed":
        weight, strategy = _rooms.with_room(weight, r), "augment"
    with backend("triton"), override_plan(Plan(strategy, strategy, "test")):
        with count_traffic() as forward:
            y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        with count_traffic() as backward:
            torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    return counted(forward), counted(backward)


def run_dora(strategy, M, K, N, r, dropout):
    """fp32, as above."""
    x, weight, a, b, m = (draw(*shape, dtype=torch.float32) for shape in ((M, K), (N, K), (r, K), (N, r), (N,)))
    weight.requires_grad_(False)
    with backend("triton"), override_plan(Plan(strategy, strategy, "test")):
        with count_traffic() as forward:
            y = apply_dora(x, weight, None, a, b, m / row_norms(weight, a, b, 0.5), 0.5, dropout)
        with count_traffic() as backward:
            torch.autograd.grad(y, (x, a, b, m), torch.ones_like(y))
    return counted(forward), counted(backward)


def run_attention(op, strategy, B, H, Hkv, S, P, D):
    q, k, v = draw(B, H, S, D), draw(B, Hkv, S, D), draw(B, Hkv, S, D)
    prefix = draw(Hkv, P, D), draw(Hkv, P, D)
    gate = [torch.ones(1, requires_grad=True)] if op is gated_prompt_attention else []
    with backend("triton"), override_plan(Plan(strategy, strategy, "test")):
        with count_traffic() as forward:
            out = op(q, k, v, *prefix, *gate)
        with count_traffic() as backward:
            torch.autograd.grad(out, (q, k, v, *prefix, *gate), torch.ones_like(out))
    return counted(forward), counted(backward)


def run_prompt(B, S, P, hidden):
    prompt, table = draw(P, hidden), draw(13, hidden).detach()
    with backend("triton"):
        with count_traffic() as forward:
            out = prompt_embedding(torch.randint(13, (B, S)), table, prompt)
        with count_traffic() as backward:
            torch.autograd.grad(out, prompt, torch.ones_like(out))
    return counted(forward), counted(backward)


@interpreter
@pytest.mark.parametrize("strategy", designs.DESIGNS["lora_linear"].strategies)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rank", [8, 40, 72])
def test_lora_linear_in_one_tile_moves_its_ledgers_bytes(strategy, dropout, rank, one_processor):
    sizes = {"M": 16, "K": 16, "N": 16, "r": rank, "dropout": dropout}
    expected = designs.lora_linear(strategy, **sizes, itemsize=4)
    assert run_lora(strategy, **sizes) == tuple(map(ledger, expected))


@interpreter
@pytest.mark.parametrize("strategy", designs.DESIGNS["dora_linear"].strategies)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_linear_in_one_tile_moves_its_ledgers_bytes(strategy, dropout, one_processor):
    sizes = {"M": 16, "K": 16, "N": 16, "r": 8, "dropout": dropout}
    expected = designs.dora_linear(strategy, **sizes, itemsize=4)
    assert run_dora(strategy, **sizes) == tuple(map(ledger, expected))


@interpreter
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize("op", [prefix_attention, gated_prompt_attention])
def test_attention_in_one_tile_moves_its_ledgers_bytes(op, strategy, one_processor):
    sizes = {"B": 1, "H": 1, "Hkv": 1, "S": 16, "P": 7, "D": 16}
    expected = getattr(designs, op.__name__)(strategy, **sizes, itemsize=2)
    forward, backward = map(ledger, expected)
    if op is gated_prompt_attention:  # a gate is a number of fp32, and stands in no ledger
        forward += Counter({"_forward_kernel": 4})
        backward += Counter({"_grad_query_kernel": 4, "_grad_keys_kernel": 4})
    assert run_attention(op, strategy, **sizes) == (forward, backward)


@interpreter
@pytest.mark.parametrize(
    ("op", "strategy"),
    [*(("lora_linear", name) for name in designs.DESIGNS["lora_linear"].strategies), ("dora_linear", "prewrite")],
)
def test_linears_in_many_tiles_move_more_but_not_much(op, strategy):
    sizes = {"M": 53, "K": 100, "N": 132, "r": 24, "dropout": 0.3}
    run = {"lora_linear": run_lora, "dora_linear": run_dora}[op]
    for found, launches in zip(
        run(strategy, **sizes), getattr(designs, op)(strategy, **sizes, itemsize=4), strict=True
    ):
        expected = ledger(launches)
        assert found.keys() == expected.keys()
        for kernel in found:
            # Of the fused product, x is read once for each of the tiles of N, and W for each of those of M.
            assert expected[kernel] <= found[kernel] <= 4 * expected[kernel], kernel


@interpreter
@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize("op", [prefix_attention, gated_prompt_attention])
def test_attention_in_many_tiles_moves_more_but_not_much(op, strategy):
    sizes = {"B": 2, "H": 4, "Hkv": 2, "S": 53, "P": 20, "D": 16}
    for found, launches in zip(
        run_attention(op, strategy, **sizes), getattr(designs, op.__name__)(strategy, **sizes, itemsize=2), strict=True
    ):
        expected = ledger(launches)
        assert found.keys() == expected.keys()
        for kernel in found:
            # The keys are read by each tile of queries of each head of a group, the prefix for each sample too.
            assert expected[kernel] <= found[kernel] <= 4 * expected[kernel], kernel


@interpreter
@pytest.mark.parametrize("hidden", [16, 100])
def test_prompt_embedding_moves_its_ledgers_bytes_in_one_tile_and_in_many(hidden):
    sizes = {"B": 5, "S": 3, "P": 2, "hidden": hidden}
    assert run_prompt(**sizes) == tuple(map(ledger, designs.prompt_embedding("fused", **sizes, itemsize=2)))


def test_the_ranks_at_which_the_kernels_change_are_the_ledgers():
    assert designs.ONE_READ_RANK == _lora_linear_triton.ONE_READ_RANK
    assert {2: FUSED_TAIL_RANK["half"], 4: FUSED_TAIL_RANK["ieee"]} == designs.FUSED_TAIL_RANK


LORA = {"M": 8192, "K": 4096, "N": 1024, "itemsize": 2}
ATTENTION = {"B": 8, "H": 32, "Hkv": 8, "S": 2048, "D": 128, "itemsize": 2}
PROMPT = {"B": 8, "S": 2048, "hidden": 4096, "itemsize": 2}
CASES = [
    *(("lora_linear", LORA | {"r": r, "dropout": p}) for r in (1, 16, 64, 65, 256) for p in (0.0, 0.05)),
    *(("dora_linear", LORA | {"r": r, "dropout": p}) for r in (1, 65) for p in (0.0, 0.05)),
    *((op, ATTENTION | {"P": p, "causal": causal}) for op in ("prefix_attention", "gated_prompt_attention")
      for p in (1, 30, 2048) for causal in (True, False)),
    *(("prompt_embedding", PROMPT | {"P": p}) for p in (1, 100)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "sizes"), CASES)
def test_no_design_does_less_than_cannot_be_avoided(op, sizes):
    design = designs.DESIGNS[op]
    for strategy in design.strategies:
        for passed, launches in zip(("fwd", "bwd"), design.launches(strategy, **sizes), strict=True):
            least, work = getattr(cost, op)(passed, **sizes), designs.total(launches)
            assert work.flops >= least.flops and work.bytes >= least.bytes, (strategy, passed)


@pytest.mark.parametrize(("op", "sizes"), CASES)
def test_the_frozen_layer_is_the_least_there_is(op, sizes):
    without = {name: 0 if name in ("r", "P") else size for name, size in sizes.items()}
    for passed, launches in zip(("fwd", "bwd"), designs.DESIGNS[op].launches("frozen", **sizes), strict=True):
        assert designs.total(launches) == getattr(cost, op)(passed, **without)


def test_a_weight_with_room_is_moved_once_and_what_pays_is_told_by_the_sizes():
    """Beside prewrite, whose result is moved twice more, what the product reads is moved twice more."""
    for inputs, outputs in ((4096, 4096), (4096, 14336), (4096, 1024), (14336, 4096)):
        sizes = {"M": 8192, "K": inputs, "N": outputs, "r": 16, "itemsize": 2}
        ways = {name: designs.lora_linear(name, **sizes) for name in ("prewrite", "augment", "rehomed")}
        (forward, backward), copying = (
            [designs.total(launches).bytes for launches in ways[name]] for name in ("rehomed", "augment")
        )
        assert copying[0] - forward == copying[1] - backward == 2 * 2 * inputs * outputs
        less = [designs.total(launches).bytes for launches in ways["prewrite"]]
        assert (forward < less[0]) is (outputs > inputs) and (backward < less[1]) is (outputs < inputs)
