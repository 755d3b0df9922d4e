"""The persistent product and weights with room on a GPU: the criterion of `fastpeft.oracle` on aligned sizes that end
inside a tile, and what only a GPU can show."""

import dataclasses

import pytest
import torch

from fastpeft.kernels import lora_gemm
from fastpeft.ops import _rooms, lora_linear
from fastpeft.oracle import GRADIENTS, lora_linear_outcomes
from tests.cuda.test_lora_linear_cuda import assert_right, problem_of
from tests.ops.lora_linear_cases import DTYPES, on

pytestmark = pytest.mark.cuda

SHAPE, OUTPUTS = (3, 331, 1032), 1000
WIDER, NARROWER = ((2, 500, 512), 1536), ((2, 500, 1536), 512)
HALF = [name for name, (data, _) in DTYPES.items() if data != torch.float32]


@pytest.fixture
def descriptors():
    """Needs a GPU that copies tiles by descriptors, and that the kernel serves what it should there."""
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tiles are copied by descriptors from compute capability 9.0 on")
    x, weight = torch.zeros(16, 64, device="cuda").half(), torch.zeros(24, 64, device="cuda").half()
    if torch.cuda.get_device_capability() in ((9, 0), (10, 0)):
        assert lora_gemm.serves(x, weight, torch.float16)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [5, 16, 128])
@pytest.mark.parametrize("dtypes", HALF)
def test_as_right_as_eager(dtypes, rank, dropout):
    with on("triton", "persistent"):
        assert_right(problem_of(SHAPE, OUTPUTS, rank, dtypes=dtypes, dropout=dropout), dtypes)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fifty_repeats_are_equal_bit_for_bit(dropout):
    problem = problem_of(SHAPE, OUTPUTS, 16, dropout=dropout)
    with on("triton", "persistent"):
        torch.manual_seed(3)
        first = lora_linear_outcomes(problem, GRADIENTS)[0]
        for _ in range(50):
            torch.manual_seed(3)
            again = lora_linear_outcomes(problem, GRADIENTS)[0]
            assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.usefixtures("descriptors")
def test_rows_beyond_32_bits():
    """x and y of more than 2**31 elements, all zero but those of the last rows, which alone must give the same."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    small = problem_of((96, 16), 32_768, 16, dtypes="bf16", bias=False)
    x = torch.zeros(70_000, 16, dtype=small.x.dtype, device="cuda")
    x[-96:] = small.x
    with on("triton", "persistent"):
        large, alone = (
            lora_linear(each, small.weight, None, small.lora_A, small.lora_B, 0.5)[-96:] for each in (x, small.x)
        )
    torch.testing.assert_close(large, alone, rtol=2e-2, atol=1e-2 * float(alone.abs().max()))


@pytest.mark.usefixtures("descriptors")
def test_a_graph_holds_it():
    problem = problem_of(SHAPE, OUTPUTS, 16)
    arguments = (problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B, 0.5)
    with on("triton", "persistent"):
        expected, graph = lora_linear(*arguments), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = lora_linear(*arguments)
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "outputs"), [WIDER, NARROWER], ids=["wider", "narrower"])
@pytest.mark.parametrize("dtypes", HALF)
def test_weights_with_room(dtypes, shape, outputs, dropout):
    problem = problem_of(shape, outputs, 16, dtypes=dtypes, dropout=dropout)
    problem = dataclasses.replace(problem, weight=_rooms.with_room(problem.weight, 16))
    with on("triton"):
        assert_right(problem, dtypes, GRADIENTS)
