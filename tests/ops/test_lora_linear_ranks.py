"""Ranks above what registers hold, which the kernels of `lora_linear` take in slices: gradients, bytes, and what is
launched on a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastpeft.kernels import lora_linear as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import lora_linear
from tests.contracts import ROOT
from tests.counting import how_many
from tests.ops import lora_linear_traffic as expected
from tests.ops.lora_linear_cases import assert_right, draws, on
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

M, K, N = 37, 69, 45
RANKS = (257, 300, 1024)
SLICES = {257: (128, 128, 1), 300: (128, 128, 44), 1024: (128,) * 8}
SIZES = expected.Sizes(2, 4)
ranks = pytest.mark.parametrize("rank", RANKS)
dropouts = pytest.mark.parametrize("dropout", [None, Dropout(torch.tensor([7]), 0.3)], ids=["", "dropout"])


def data(*shape):
    return torch.randn(*shape).half()


@pytest.mark.parametrize(
    ("strategy", "dtypes"),
    [("fused", "fp32"), ("prewrite", "fp32"), ("prewrite", "fp16-fp32"), ("addmm", "fp16"), ("augment", "fp16")],
)
def test_by_every_plan(strategy, dtypes):
    with on("triton", strategy):
        assert_right(draws(2, rank=300, dtypes=dtypes, dropout=0.3 if dtypes == "fp32" else 0.0))


@pytest.mark.parametrize("wanted", [("lora_A",), ("lora_B", "bias"), ("x",)])
def test_subsets_of_gradients(wanted):
    with on("triton", "prewrite"):
        assert_right(draws(2, rank=257), wanted)


def test_one_mask_for_all_slices():
    """With W, A and B of ones each output counts what was kept, as often as there are ranks."""
    x, ones = torch.ones(5, 64), torch.ones
    with on("triton", "prewrite"):
        y = lora_linear(x, torch.zeros(3, 64), None, ones(300, 64), ones(3, 300), 1.0, dropout=0.5, training=True)
    kept = y[:, 0] / 300 * 0.5
    assert torch.equal(kept, kept.round()) and 0 < kept.min() < kept.max() < 64


def test_a_strided_slice_of_t_is_read_as_it_is():
    t, x = torch.randn(300, M).t(), torch.randn(M, K)
    for transposed in (False, True):
        found, tail, total = kernels.grad_columns(
            t, x, torch.float32, tail_of=torch.randn(300, K), with_sum=True, transposed=transposed, scale=0.5
        )
        product = 0.5 * t.t() @ x
        torch.testing.assert_close(found, product.t() if transposed else product, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(total, x.sum(0), rtol=1e-4, atol=1e-4)
        assert tail.shape == (M, K)


@ranks
@dropouts
def test_shrink_reads_x_once_for_each_slice(rank, dropout):
    with count_traffic() as traffic:
        kernels.shrink(data(M, K), torch.randn(rank, K), 1.0, torch.float32, dropout, SMALL)
    counts = [expected.shrink(M, K, r, SMALL, 2, 4, 4, 4, dropout is not None) for r in SLICES[rank]]
    loads, stores = traffic.of("_shrink_kernel")
    assert (loads, stores) == tuple(summed([each[place] for each in counts]) for place in (0, 1))
    assert loads["x_ptr"] == len(SLICES[rank]) * M * K * 2 and traffic.atomics == 0


@ranks
@dropouts
def test_grad_columns_reads_x_once_for_each_slice(rank, dropout):
    with count_traffic() as traffic:
        kernels.grad_columns(
            torch.randn(M, rank), data(M, K), torch.float32, tail_of=torch.randn(rank, K), with_sum=True,
            dropout=dropout, tiles=SMALL,
        )  # fmt: skip
    counts = [
        expected.grad_columns(M, K, r, SMALL, SIZES, 4, total=not number, dropout=dropout is not None)
        for number, r in enumerate(SLICES[rank])
    ]
    assert traffic.of("_grad_columns_kernel") == tuple(summed([each[place] for each in counts]) for place in (0, 1))
    assert traffic.of("_tail_kernel") == expected.tail(M, K, rank, SMALL, SIZES, dropout=dropout is not None)
    assert traffic.kernels().count("_grad_columns_kernel") == len(SLICES[rank])


def summed(counts: list[dict]) -> dict:
    return {name: sum(each.get(name, 0) for each in counts) for name in {key for each in counts for key in each}}


LAUNCHES = """
import json, sys, torch
from tests import aot
from tests.ops.aot_lora_linear import launch_all
found = {}
for name in sys.argv[1:]:
    gpu = aot.TARGETS[name].gpu
    known = {l.key for l in aot.recorded_launches(lambda: launch_all("bf16-fp32", 128, 0.1), gpu)}
    high = [l for l in aot.recorded_launches(lambda: launch_all("bf16-fp32", 1024, 0.1), gpu)]
    found[name] = [len(high), [l.name for l in high if l.key not in known]]
print(json.dumps(found))
"""


def test_what_is_launched_for_a_gpu_is_what_the_compile_gate_compiles_at_rank_128():
    """So it spills nowhere where that does not."""
    targets = ("sm_90", "gfx942")[: how_many(1, 2)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, *targets], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(targets)
    assert all(count > 100 and new == [] for count, new in found.values()), found
