"""HF peft under torch.compile, as a peer of the ops that stand for several of its layers."""

import pytest
import torch

from benchmarks import lora_mlp_peers, lora_projections_peers
from benchmarks.lora_mlp_truth import MlpTruth
from benchmarks.lora_projections_truth import ProjectionsTruth
from tests.benchmarks import test_bench_lora_mlp, test_bench_lora_projections

OPS = {
    "lora_mlp": (lora_mlp_peers, MlpTruth, test_bench_lora_mlp),
    "lora_projections": (lora_projections_peers, ProjectionsTruth, test_bench_lora_projections),
}


@pytest.mark.parametrize(("peers", "truth", "bench"), OPS.values(), ids=OPS)
def test_peft_s_layers_are_compiled_as_one(monkeypatch, peers, truth, bench):
    """Without a compilation, of which a CPU's would take half a minute."""
    inputs, asked = bench.inputs_of(bench.CELL, bench.CPU), []
    (compiled,) = [each for each in peers.IMPLEMENTATIONS if each.compiled]
    assert (compiled.name, compiled.peer) == ("peft-compile", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    compiled.build(inputs)  # imports what peft asks for, which may compile something of its own
    asked.clear()
    assert truth(inputs).verify(compiled.build(inputs)).problems == [] and asked == [{"dynamic": False}]
