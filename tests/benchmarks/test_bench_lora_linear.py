"""Which linear layers `fastpeft bench lora` measures, and LoRAFusion among its peers."""

import re
import sys
import types

import pytest
import torch

from benchmarks import bench_lora_linear as bench
from benchmarks import checkin
from benchmarks import lora_linear_peers as peers
from benchmarks.baselines import Missing
from benchmarks.report import FLOOR
from benchmarks.request import Request
from fastpeft.errors import FastpeftError
from fastpeft.plans import LORA_STRATEGIES

LLAMA = [("q/o", 4096, 4096), ("gate/up", 4096, 14336), ("k/v", 4096, 1024), ("down", 14336, 4096)]


def asked(**options):
    return [(c.name, c.M, c.K, c.N, c.r, c.dropout) for c in bench.cells(Request(**options))]


def test_a_model_by_name_is_its_linear_layers():
    assert asked(dropouts=(0.0,)) == [(f"llama3-8b {name}", 8192, k, n, 16, 0.0) for name, k, n in LLAMA]
    assert asked(quick=True) == [("llama3-8b q/o", 8192, 4096, 4096, 16, 0.0)]
    bert = asked(shapes=("bert-base",), batches=(2,), seqs=(10, 20), ranks=(8, 64), dropouts=(0.1,))
    kinds = [("q/k/v/o", 768, 768), ("up", 768, 3072), ("down", 3072, 768)]
    assert bert == [
        (f"bert-base {name}, {way}", m, k, n, r, 0.1)
        for r in (8, 64) for m in (20, 40) for name, k, n in kinds for way in ("replayed", "eager")
    ]  # fmt: skip


def test_lorafusions_grid_has_its_own_sizes_and_dropout():
    grid = asked(shapes=("lorafusion-grid",))
    assert sorted(grid) == sorted(
        ("lorafusion-grid", m, n, n, 16, 0.1) for n in (4096, 5120, 8192) for m in (2048, 8192)
    )
    assert {c[4:] for c in asked(shapes=("lorafusion-grid",), ranks=(32,), dropouts=(0.0,))} == {(32, 0.0)}


def test_sizes_by_numbers():
    assert asked(shapes=((130, 72, 40),), dropouts=(0.0,)) == [("given", 130, 72, 40, 16, 0.0)]
    for options, words in (
        ({"shapes": ((130, 72),)}, "--shape 130,72 is not M,K,N"),
        ({"shapes": ((130, 72, 40),), "batches": (2,)}, "130,72,40 is M,K,N already"),
    ):
        with pytest.raises(FastpeftError, match=re.escape(words)):
            bench.cells(Request(**options))


def test_on_a_cpu_half_precision_drops_what_it_can_scale_exactly():
    assert {(c.dtype, c.dropout) for c in bench.cells(Request(tiny=True))} == {("fp32", 0.0), ("fp32", 0.05)}
    assert {(c.dtype, c.dropout) for c in bench.cells(Request(tiny=True, dtype="bf16"))} == {
        ("bf16", 0.0),
        ("bf16", 0.5),
    }


def test_lorafusion_is_named_where_it_is_missing_and_called_where_it_is_there(monkeypatch):
    """Its function as it is called: x with three dimensions, the result with three."""
    cell = bench.Cell("tiny", 24, 32, 40, 8, 0.0, "fp32")
    inputs = bench.inputs_of(cell, torch.device("cpu"))
    with pytest.raises(Missing, match="lorafusion is not installed"):
        peers.build_lorafusion(inputs)

    def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        batch, length, _ = x.shape
        y = x @ linear_w.T + alpha * (x @ lora_a.T) @ lora_b.T
        return y.reshape(batch, length, -1)

    made = types.ModuleType("lorafusion.ops.lora_v1")
    made.fused_linear_lora = fused_linear_lora
    for name, module in (("lorafusion", types.ModuleType("lorafusion")), ("lorafusion.ops", types.ModuleType("ops")),
                         ("lorafusion.ops.lora_v1", made)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert bench.truth_of(inputs).verify(peers.build_lorafusion(inputs), 2.0).problems == []


def test_the_first_tier_has_the_vendor_s_product_beside_every_way_of_ours():
    """What decides among them: in one round, on wide and narrow results, forward and backward apart."""
    first = bench.tiers(False)[0]
    assert {cell.N for cell in first} == {1024, 4096, 14336}
    names = {implementation.name for implementation in peers.IMPLEMENTATIONS}
    assert names >= {FLOOR, "fastpeft:rehomed", *(f"fastpeft:{name}" for name in LORA_STRATEGIES)}
    steps = [name for name, _, _ in checkin.STEPS]
    assert steps.index("lora") < steps.index("prefix") and {"fwd", "bwd"} < set(checkin.PASSES)
