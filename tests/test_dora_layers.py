"""DoRA in models: twenty steps beside peft, what a layer keeps for backward, and when the op computes it."""

import copy

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.tuners import dora
from tests.memory import Allocations, saved_for_backward
from tests.models import batch, tiny
from tests.peft_pair import assert_same_gradients, close, pair_of, randomise

SETTINGS = {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ROWS, K, N, R = 64, 96, 80, 4


def test_twenty_steps_are_peft_s():
    hf, ours = pair_of(tiny, SETTINGS)
    models = {"peft": hf, "native": ours, "patched": fastpeft.patch(copy.deepcopy(hf))}
    losses = {}
    for name, model in models.items():
        trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
        optimizer, losses[name] = torch.optim.AdamW(trained, lr=1e-3), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["peft"][-1] < losses["peft"][0]
    assert losses["native"] == pytest.approx(losses["peft"], rel=1e-5)
    assert losses["patched"] == pytest.approx(losses["peft"], rel=1e-5)


def one(kind=nn.Linear) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(kind(K, N))


def layers(dropout: float):
    """(peft's model of one layer, ours, an input of it)"""
    hf, ours = pair_of(one, {"r": R, "use_dora": True, "target_modules": ["0"], "lora_dropout": dropout})
    randomise(hf, ours)
    return hf.train(), ours.train(), torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(("dropout", "less"), [(0.0, 2.2), (0.3, 2.7)])
def test_a_layer_keeps_its_input_s_and_the_base_s_result(dropout, less):
    """And a seed; peft keeps a mask, what is left of x, and results of four products."""
    hf, ours, x = layers(dropout)
    kept = []
    for model in (hf, ours):
        with saved_for_backward(besides=tuple(model.parameters())) as saved:
            model(x)
        kept.append(sum(saved.values()))
    norms = 2 * N * 4  # of the quotient m/‖V‖: it and the norms
    assert kept[1] <= 4 * (ROWS * K + ROWS * N + ROWS * R) + norms + 8 * (dropout > 0)
    print(f"kept {kept[1]:,} B, HF peft {kept[0]:,} B")
    assert kept[1] * less <= kept[0]


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_makes_nothing_as_large_as_the_weight(dropout, name):
    """Of few rows of x, beside which W + s·B A would be by far the largest; the norms are in it."""
    torch.manual_seed(3)
    config = fastpeft.LoraConfig(r=R, use_dora=True, target_modules=["0"], lora_dropout=dropout)
    model = fastpeft.patch(nn.Sequential(nn.Linear(768, 512)), config, backend=name).train()
    x = torch.randn(8, 768).requires_grad_()
    with Allocations() as allocations:
        model(x).sum().backward()
    assert 8 * 768 * 4 <= max(allocations.sizes) < 512 * 768 * 4


@pytest.mark.parametrize("reason", ["as it is", "a trained weight", "another forward", "two adapters"])
def test_when_the_op_computes_it(reason, monkeypatch):
    """Whatever computes it, the numbers are peft's."""
    calls, apply = [], dora.apply_dora
    monkeypatch.setattr(dora, "apply_dora", lambda *given: calls.append(1) or apply(*given))

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    kind = Doubled if reason == "another forward" else nn.Linear
    hf, ours = pair_of(lambda: one(kind), {"r": R, "use_dora": True, "target_modules": ["0"]})
    if reason == "two adapters":
        for model, library in ((hf, peft), (ours, fastpeft)):
            torch.manual_seed(5)
            model.add_adapter("b", library.LoraConfig(r=R, use_dora=True, target_modules=["0"]))
            (model.base_model if model is hf else model).set_adapter(["default", "b"])
    randomise(hf, ours)
    if reason == "a trained weight":
        for layer in (hf.base_model.model[0].base_layer, ours[0]):
            layer.weight.requires_grad_(True)
    x = torch.randn(ROWS, K)
    outputs = [model(x) for model in (hf, ours)]
    close(outputs[1], outputs[0], 1e-5)
    for output in outputs:
        output.square().mean().backward()
    assert_same_gradients(hf, ours, 1e-4)
    assert bool(calls) == (reason == "as it is")


def test_compiled_it_is_one_graph_with_one_node_for_the_norms():
    _, ours, x = layers(0.3)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours.eval(), backend=keep, fullgraph=True)
    close(compiled(x), ours(x), 1e-6)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and targets.count("fastpeft.row_norms") == 1
    torch._dynamo.reset()


def test_the_report_names_the_op():
    hf, ours = pair_of(one, {"r": R, "use_dora": True, "target_modules": ["0"]})
    for model in (ours, fastpeft.patch(hf)):
        assert [row.op for row in fastpeft.report(model).layers] == ["dora_linear"]
