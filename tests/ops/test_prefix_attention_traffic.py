"""The kernels of `prefix_attention` move the bytes that `prefix_attention_traffic` derives, and not one more."""

import pytest
import torch

from fastpeft.kernels import prefix_attention as kernels
from fastpeft.kernels._attention_tiles import AttentionTiles
from fastpeft.ops._prefix_attention_scores import Tensors
from tests.ops import prefix_attention_traffic as expected
from tests.ops.prefix_attention_cases import on, op_outcome, problem
from tests.ops.prefix_attention_traffic import Shape
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]
ROWS, COLUMNS, PREFIX = 16, 32, 16
TILES = AttentionTiles(ROWS, COLUMNS, PREFIX, stages=1)
SHAPES = [
    Shape(2, 4, 2, queries=37, keys=37, prefix=35, depth=20, data=2),
    Shape(1, 2, 1, queries=21, keys=70, prefix=7, depth=16, data=2),
    Shape(2, 2, 2, queries=21, keys=70, prefix=20, depth=16, data=2, causal=False),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["square", "cached", "bidirectional"])


def _case(shape: Shape):
    return problem(
        *["bidirectional"] * (not shape.causal), batch=shape.batch, heads=shape.heads, kv_heads=shape.kv_heads,
        queries=shape.queries, keys=shape.keys, prefix=shape.prefix, depth=shape.depth, dtype=torch.float16,
    )  # fmt: skip


@shapes
def test_forward_reads_the_prefix_once_per_tile_of_queries(shape):
    case = _case(shape)
    with count_traffic() as traffic:
        kernels.forward(case.tensors, case.scores, tiles=TILES)
    assert traffic.of("_forward_kernel") == expected.forward(shape, ROWS, COLUMNS)


@shapes
def test_merging_reads_and_writes_a_result_once(shape):
    case = _case(shape)
    own = torch.zeros_like(case.dout_BHSD), torch.zeros(case.dout_BHSD.shape[:3])
    with count_traffic() as traffic:
        kernels.forward(case.tensors, case.scores, sequence=False, first=own, tiles=TILES)
    assert traffic.of("_forward_kernel") == expected.merged(shape, ROWS)


@shapes
def test_gradients(shape, monkeypatch):
    case = _case(shape)
    dout, tensors, scores = case.dout_BHSD, case.tensors, case.scores
    out, lse = kernels.forward(tensors, scores)
    with count_traffic() as traffic:
        delta, _ = kernels.grad_query(dout, out, lse, tensors, scores, tiles=TILES)
    assert traffic.of("_grad_query_kernel") == expected.grad_query(shape, ROWS, COLUMNS)
    with count_traffic() as traffic:
        kernels.grad_keys(dout, lse, delta, tensors, scores, prefix=False, tiles=TILES)
    assert traffic.of("_grad_keys_kernel") == expected.grad_keys(shape, ROWS, COLUMNS)


@shapes
def test_gradient_of_the_queries_in_fp32_reads_the_keys_twice(shape):
    case = _case(shape)
    tensors, dout = Tensors(*(None if t is None else t.float() for t in case.tensors)), case.dout_BHSD.float()
    out, lse = kernels.forward(tensors, case.scores)
    with count_traffic() as traffic:
        kernels.grad_query(dout, out, lse, tensors, case.scores, tiles=TILES)
    shape = shape._replace(data=4)
    assert traffic.of("_grad_query_kernel") == expected.grad_query_in_fp32(shape, ROWS, COLUMNS)


@pytest.mark.parametrize(("processors", "runs"), [(1, 1), (8, 4), (1000, 12)])
def test_the_prefixs_gradients_cost_one_pass_and_a_sum_for_each_run(processors, runs, monkeypatch):
    """Programs are two a processor: P = 35 are two tiles, of each of two kv heads, and 12 steps of queries."""
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    shape = SHAPES[0]
    case = _case(shape)
    _, lse = kernels.forward(case.tensors, case.scores)
    delta = torch.zeros(case.dout_BHSD.shape[:3])
    with count_traffic() as traffic:
        kernels.grad_keys(case.dout_BHSD, lse, delta, case.tensors, case.scores, prefix=True, tiles=TILES)
    assert traffic.of("_grad_keys_kernel") == expected.grad_prefix(shape, COLUMNS, runs)
    assert traffic.kernels().count("_sum_partials_kernel") == (runs > 1)


def test_a_window_is_not_left():
    """W = 5 of 64 keys: a tile of 16 queries sees at most two tiles of 16 keys, and of the prefix what it reaches."""
    case = problem(batch=1, heads=1, kv_heads=1, queries=64, prefix=32, depth=16, dtype=torch.float16, window=5)
    with count_traffic() as traffic:
        kernels.forward(case.tensors, case.scores)
    loads, _ = traffic.of("_forward_kernel")
    assert loads["k_ptr"] == loads["v_ptr"] == (16 + 3 * 32) * 16 * 2
    assert loads["pk_ptr"] == loads["pv_ptr"] == 16 * 16 * 2


def test_no_byte_of_k_or_v_is_copied():
    case = problem(dtype=torch.float16)
    with on("triton", "fused"), count_traffic() as traffic:
        op_outcome(case)
    written = {name for launch in traffic.launches for name in launch.stores}
    assert written == {"out_ptr", "lse_ptr", "dq_ptr", "delta_ptr", "dk_ptr", "dv_ptr"}
