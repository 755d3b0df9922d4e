"""The cost model by hand on small sizes, against published arithmetic, and against bytes counted in the interpreter."""

import pytest
import torch

from fastpeft import cost
from fastpeft.cost import NOTHING, PASSES, Machine, Work, floor_ms
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.errors import OpError
from fastpeft.kernels import lora_linear as kernels
from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import lora_linear, prefix_attention
from tests.traffic import SUMS, count_traffic

ROOFLINE = Machine("an H200 as measured", 790.0, 4300.0)
LLAMA = {"B": 8, "H": 32, "Hkv": 8, "S": 2048, "D": 128, "itemsize": 2}

SMALL_CASES = [
    # x 2·3, W 5·3, A 2·3, B 5·2, S 2·2, y 2·5: 51 elements; products 2·2·(5·3 + 2·3 + 5·2).
    (cost.lora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 4}, Work(124, 51 * 4)),
    # dY, W, x, S, A, B, then dX, dA, dB: 10 + 15 + 6 + 4 + 16 + 6 + 16; products dX, and twice the low-rank ones.
    (cost.lora_linear, "bwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 4}, Work(188, 73 * 4)),
    (cost.lora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 4, "dropout": 0.1}, Work(124, 51 * 4 + 8)),
    (cost.lora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 0, "itemsize": 2, "dropout": 0.1}, Work(60, 31 * 2)),
    (cost.lora_linear, "fwd+bwd", {"M": 2, "K": 3, "N": 5, "r": 0, "itemsize": 2}, Work(120, 62 * 2)),
    # One x of 2 rows for 5 and 4 outputs: x 6, y 18, W 27, A, B 30, S 8 elements, of which backward reads x and S once
    # more and has A, B twice; products 2·2·27, low-rank ones 2·2·2·15.
    (cost.lora_projections, "fwd", {"M": 2, "K": 3, "N": (5, 4), "r": 2, "itemsize": 2},
     Work(108 + 120, (51 + 30 + 8) * 2)),
    (cost.lora_projections, "bwd", {"M": 2, "K": 3, "N": (5, 4), "r": 2, "itemsize": 2, "dropout": 0.1},
     Work(108 + 240, (51 + 14 + 60) * 2 + 16)),
    (cost.lora_projections, "fwd+bwd", {"M": 2, "K": 3, "N": (5, 4), "r": 0, "itemsize": 2}, Work(216, 102 * 2)),
    # As lora_linear's 51 elements and, in backward, 73; beside them m's 5, in backward dm's 5 and y's 10, and 5 norms
    # in fp32, one more product of 2·5·3·2. Under dropout the base's product is there twice, and 10 of it are written.
    (cost.dora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2}, Work(124 + 60, 56 * 2 + 20)),
    (cost.dora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2, "norms": False}, Work(124, 56 * 2 + 20)),
    (cost.dora_linear, "bwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2}, Work(188, 93 * 2 + 20)),
    (cost.dora_linear, "fwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2, "dropout": 0.1},
     Work(184 + 60, 66 * 2 + 28)),
    (cost.dora_linear, "bwd", {"M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2, "dropout": 0.1}, Work(248, 93 * 2 + 28)),
    (cost.dora_linear, "fwd+bwd", {"M": 2, "K": 3, "N": 5, "r": 0, "itemsize": 2, "dropout": 0.1}, Work(120, 62 * 2)),
    # Two rows, 3 inputs, 5 hidden features, 4 outputs: x 6, y 8, gate and up 20, W 50, A, B 50, three S 12 elements, of
    # which backward reads x and S once more and has A, B twice; products 2·2·50, low-rank ones 2·2·2·25.
    (cost.lora_mlp, "fwd", {"M": 2, "K": 3, "H": 5, "N": 4, "r": 2, "itemsize": 2}, Work(400, (84 + 50 + 12) * 2)),
    (cost.lora_mlp, "bwd", {"M": 2, "K": 3, "H": 5, "N": 4, "r": 2, "itemsize": 2, "dropout": 0.1},
     Work(600, (84 + 18 + 100) * 2 + 24)),
    (cost.lora_mlp, "fwd+bwd", {"M": 2, "K": 3, "H": 5, "N": 4, "r": 0, "itemsize": 2}, Work(400, 84 * 4)),
    # Three samples of 2 rows, one of them with rank 2 and one with rank 1: x 18, y 30, W 15, A, B 24, S 6 elements, of
    # which backward reads 12 of x's once more and has A, B twice; products 2·6·15, low-rank ones 2·6·8.
    (cost.mixed_lora_linear, "fwd", {"B": 3, "S": 2, "K": 3, "N": 5, "served": ((1, 2), (1, 1)), "itemsize": 2},
     Work(180 + 96, (63 + 24 + 6) * 2)),
    (cost.mixed_lora_linear, "bwd", {"B": 3, "S": 2, "K": 3, "N": 5, "served": ((1, 2), (1, 1)), "itemsize": 2},
     Work(180 + 192, (63 + 12 + 6 + 48) * 2)),
    # Three rows of two experts of rank 2: x, y 24, W 30, A, B 32, S 6 elements, of which backward reads x's 9 and S
    # once more and has A, B twice; products 2·3·15, low-rank ones 2·3·2·8.
    # more and has A, B twice; products 2·3·15, low-rank ones 2·3·2·8.
    (cost.expert_lora_linear, "fwd", {"M": 3, "E": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2},
     Work(90 + 96, (54 + 32 + 6) * 2)),
    (cost.expert_lora_linear, "bwd", {"M": 3, "E": 2, "K": 3, "N": 5, "r": 2, "itemsize": 2},
     Work(90 + 192, (54 + 15 + 64) * 2)),
    (cost.expert_lora_linear, "fwd+bwd", {"M": 3, "E": 2, "K": 3, "N": 5, "r": 0, "itemsize": 2}, Work(180, 108 * 2)),
    # Half of 4·4 pairs and 4·3 of the prefix, times 2 products of 2·2 operations, for 2 heads; q, out 16, k, v 8, 2·6.
    (cost.prefix_attention, "fwd", {"B": 1, "H": 2, "Hkv": 1, "S": 4, "P": 3, "D": 2, "itemsize": 2},
     Work(2 * 2 * 4 * 20, (32 + 16 + 12) * 2 + 8 * 4)),
    (cost.prefix_attention, "bwd", {"B": 1, "H": 2, "Hkv": 1, "S": 4, "P": 3, "D": 2, "itemsize": 2},
     Work(2 * 5 * 4 * 20, (64 + 32 + 24) * 2 + 8 * 4)),
    (cost.prefix_attention, "fwd", {"B": 1, "H": 2, "Hkv": 1, "S": 4, "P": 0, "D": 2, "itemsize": 2, "causal": False},
     Work(2 * 2 * 4 * 16, (32 + 16) * 2 + 8 * 4)),
    # As attention with a prefix, and the sequence's own result once more.
    (cost.gated_prompt_attention, "fwd", {"B": 1, "H": 2, "Hkv": 1, "S": 4, "P": 3, "D": 2, "itemsize": 2},
     Work(2 * 2 * 4 * 20, (32 + 16 + 12 + 16) * 2 + 8 * 4)),
    (cost.gated_prompt_attention, "bwd", {"B": 1, "H": 2, "Hkv": 1, "S": 4, "P": 3, "D": 2, "itemsize": 2},
     Work(2 * 5 * 4 * 20, (64 + 32 + 24) * 2 + 8 * 4)),
    # 6 rows of the table and 2 learned ones read, 3·(2 + 2) written, of 5 numbers; 6 tokens of 8 bytes.
    (cost.prompt_embedding, "fwd", {"B": 3, "S": 2, "P": 2, "hidden": 5, "itemsize": 2}, Work(0, (8 + 12) * 10 + 48)),
    (cost.prompt_embedding, "bwd", {"B": 3, "S": 2, "P": 2, "hidden": 5, "itemsize": 2}, Work(30, (6 + 2) * 10)),
    (cost.prompt_embedding, "bwd", {"B": 3, "S": 2, "P": 0, "hidden": 5, "itemsize": 2}, NOTHING),
]  # fmt: skip


@pytest.mark.parametrize(("op", "passed", "sizes", "expected"), SMALL_CASES)
def test_by_hand(op, passed, sizes, expected):
    assert op(passed, **sizes) == expected


WHOLE = [
    (cost.lora_linear, {"M": 8, "K": 16, "N": 32, "r": 4, "itemsize": 2, "dropout": 0.1}, "r"),
    (cost.dora_linear, {"M": 8, "K": 16, "N": 32, "r": 4, "itemsize": 2, "dropout": 0.1}, "r"),
    (cost.prefix_attention, LLAMA | {"P": 30}, "P"),
    (cost.gated_prompt_attention, LLAMA | {"P": 30}, "P"),
    (cost.prompt_embedding, {"B": 8, "S": 2048, "P": 30, "hidden": 4096, "itemsize": 2}, "P"),
]


@pytest.mark.parametrize(("op", "sizes", "of_adapter"), WHOLE)
def test_passes_add_up_and_an_adapter_only_adds(op, sizes, of_adapter):
    forward, backward, both = (op(passed, **sizes) for passed in PASSES)
    assert forward + backward == both == sum((forward, backward), NOTHING)
    for passed in PASSES:
        with_it, without = op(passed, **sizes), op(passed, **sizes | {of_adapter: 0})
        assert with_it.flops >= without.flops and with_it.bytes > without.bytes
        assert with_it.flops > without.flops or (op is cost.prompt_embedding and passed == "fwd")


def test_work_is_added_as_work_and_not_as_a_tuple():
    assert Work(1, 2) + Work(10, 20) == Work(11, 22)


@pytest.mark.parametrize(("N", "base_us", "rank", "floor_percent"), [
    (4096, 696, 16, 1.2), (1024, 174, 64, 11.7), (14336, 2436, 128, 6.0),
])  # fmt: skip
def test_the_lora_linear_agrees_with_the_published_roofline(N, base_us, rank, floor_percent):
    """The frozen layer's operations at 8192 tokens, and those of the adapter beyond them, 1.5 r (1/K + 1/N)."""
    sizes = {"M": 8192, "K": 4096, "N": N, "itemsize": 2}
    frozen = cost.lora_linear("fwd+bwd", **sizes, r=0)
    assert 1e3 * floor_ms(frozen, ROOFLINE) == pytest.approx(base_us, rel=2e-3)
    assert 100 * (cost.lora_linear("fwd+bwd", **sizes, r=rank).flops / frozen.flops - 1) == pytest.approx(
        floor_percent, abs=0.06
    )


@pytest.mark.parametrize(("S", "forward_us", "backward_us"), [(2048, 348, 870), (8192, 5567, 13918)])
def test_attention_agrees_with_the_published_roofline(S, forward_us, backward_us):
    sizes = LLAMA | {"S": S}
    for passed, expected in (("fwd", forward_us), ("bwd", backward_us)):
        assert 1e3 * floor_ms(cost.prefix_attention(passed, **sizes, P=0), ROOFLINE) == pytest.approx(
            expected, rel=2e-3
        )
        # A prefix adds 2P/S of the operations, in both passes.
        base, with_prefix = (cost.prefix_attention(passed, **sizes, P=P).flops for P in (0, 30))
        assert with_prefix / base == pytest.approx(1 + 60 / S)


def test_the_floor_is_the_longer_of_the_two():
    machine = Machine("", tflops=2.0, gbps=4.0)
    assert floor_ms(Work(flops=6 * 10**9, bytes=0), machine) == pytest.approx(3.0)
    assert floor_ms(Work(flops=6 * 10**9, bytes=20 * 10**6), machine) == pytest.approx(5.0)
    assert floor_ms(NOTHING, machine) == 0.0


def test_the_machines_are_those_that_were_agreed_on():
    assert list(cost.MACHINES) == ["h100", "h200", "b200", "mi300x"]
    assert all(machine.tflops > 500 and machine.gbps > 3000 for machine in cost.MACHINES.values())


@pytest.mark.parametrize(("change", "said"), [
    ({"passed": "both"}, "passed='both': choose one of 'fwd', 'bwd', 'fwd+bwd'"),
    ({"M": 0}, "M=0: at least 1 is wanted"),
    ({"r": -1}, "r=-1: at least 0 is wanted"),
])  # fmt: skip
def test_a_wrong_argument_is_named(change, said):
    arguments = {"passed": "fwd", "M": 2, "K": 3, "N": 5, "r": 2, "itemsize": 4} | change
    with pytest.raises(OpError) as refusal:
        cost.lora_linear(**arguments)
    assert str(refusal.value) == said


# Against the kernels, in the interpreter.


def bytes_of(traffic, *without: str) -> int:
    launches = [launch for launch in traffic.launches if launch.kernel not in without]
    return sum(launch.loads.total() + launch.stores.total() for launch in launches)


def attention_bytes(B, H, Hkv, S, P, D) -> tuple[int, int]:
    """Counted in forward, and in backward without partial sums, of the fused strategy in fp16."""
    shapes = (B, H, S, D), (B, Hkv, S, D), (B, Hkv, S, D), (Hkv, P, D), (Hkv, P, D)
    tensors = [torch.randn(shape).half().requires_grad_() for shape in shapes]
    with backend("triton"), override_plan(Plan("fused", "fused", "test")):
        with count_traffic() as forward:
            out = prefix_attention(*tensors)
        with count_traffic() as backward:
            torch.autograd.grad(out, tensors, torch.ones_like(out))
    return bytes_of(forward), bytes_of(backward, *SUMS)


@pytest.mark.interpreter
@pytest.mark.parametrize(("S", "P", "D"), [(16, 7, 16), (11, 16, 20)])
def test_attention_in_one_tile_moves_no_more_than_the_least(S, P, D):
    sizes = {"B": 1, "H": 1, "Hkv": 1, "S": S, "P": P, "D": D}
    forward, backward = attention_bytes(**sizes)
    assert forward == cost.prefix_attention("fwd", **sizes, itemsize=2).bytes
    # δ and three kernels in place of one: q and dout are read by each.
    assert 1 < backward / cost.prefix_attention("bwd", **sizes, itemsize=2).bytes < 2


@pytest.mark.interpreter
def test_attention_in_many_tiles_reads_again_what_tiles_do():
    """Of 53 queries in tiles of 16, and two heads for each of the keys': at most 8 times each key."""
    sizes = {"B": 2, "H": 4, "Hkv": 2, "S": 53, "P": 20, "D": 16}
    for passed, found in zip(("fwd", "bwd"), attention_bytes(**sizes), strict=True):
        assert 1 < found / cost.prefix_attention(passed, **sizes, itemsize=2).bytes < 4


@pytest.mark.interpreter
def test_the_frozen_product_in_one_tile_moves_no_more_than_the_least():
    x, weight = torch.randn(SMALL.rows, 40).half(), torch.randn(SMALL.columns, 40).half()
    none = torch.randn(SMALL.rows, 0).half(), torch.randn(SMALL.columns, 0).half()
    with count_traffic() as traffic:
        kernels.tail(*none, torch.float16, base=(x, weight), tiles=SMALL)
    least = cost.lora_linear("fwd", M=SMALL.rows, K=40, N=SMALL.columns, r=0, itemsize=2)
    assert bytes_of(traffic) == least.bytes


@pytest.mark.interpreter
@pytest.mark.parametrize(("sizes", "limit"), [
    ({"M": 16, "K": 16, "N": 16, "r": 8}, 2),  # one tile: x is read for S and for the product, dY for dB and for dX
    ({"M": 53, "K": 100, "N": 132, "r": 24}, 5),
])  # fmt: skip
def test_the_lora_linear_moves_more_than_the_least_and_not_much(sizes, limit):
    """The least would need a kernel that makes y from the S that it makes itself, as no tile of columns can."""
    x, weight, a, b = (
        torch.randn(*(sizes[letter] for letter in letters), requires_grad=letters != "NK")
        for letters in ("MK", "NK", "rK", "Nr")
    )
    with backend("triton"), override_plan(Plan("fused", "fused", "test")):
        with count_traffic() as forward:
            y = lora_linear(x, weight, None, a, b, 0.5)
        with count_traffic() as backward:
            torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    for passed, traffic in (("fwd", forward), ("bwd", backward)):
        ratio = bytes_of(traffic, *SUMS) / cost.lora_linear(passed, **sizes, itemsize=4).bytes
        assert 1 < ratio < limit
