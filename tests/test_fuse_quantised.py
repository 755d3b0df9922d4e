"""`fuse` on quantised bases: their own forwards give the base products, and the low-rank terms of projections that read
one tensor are one op. A step is what it is layer by layer, and trains as HF peft's beside it."""

import copy
import sys

import peft
import pytest
import torch
from torch import nn

import fastpeft
from tests.fused import LORA, SIZES, adapted, assert_alike, called, fused, outcome
from tests.fused import seen as seen
from tests.models import batch, tiny
from tests.peft_pair import close, quietly, randomise
from tests.quantised import load
from tests.test_fuse_life import assert_nothing_is_held, attention_of, siblings_of

WAYS = pytest.mark.parametrize("way", ["native", "peft"])


def quantised(kind: str, way: str, **settings) -> nn.Module:
    """A model in eval mode on a quantised base, with an adapter that is not neutral."""
    if kind == "fp8":
        return fastpeft.quantise_base_fp8(adapted(way, base=tiny().requires_grad_(False), **settings))
    return adapted(way, base=quietly(load, kind), **settings)


def pair(kind: str, way: str, **settings) -> tuple[nn.Module, nn.Module]:
    """(a model that goes together, the same model that does not)."""
    together, alone = (quantised(kind, way, **settings) for _ in range(2))
    called(alone)  # as the other was, after which bitsandbytes may multiply 4-bit weights in half precision
    return fused(together), alone


@WAYS
@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8", "fp8"])
def test_training_is_as_without(kind, way, seen):
    """With the very masks of dropout; evaluated first, in which no gradient is wanted."""
    model, alone = pair(kind, way, lora_dropout=0.3, rank_pattern={"k_proj": 2, "up_proj": 7})
    for mode in (False, True):
        seen.clear()
        found, expected = (outcome(each.train(mode)) for each in (model, alone))
        assert seen == SIZES and len(found) > 20
        assert_alike(found, expected)
    assert_nothing_is_held(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_qlora_is_as_in_peft(kind, reentrant, seen):
    """In bf16 with checkpointing, twenty steps."""
    losses = []
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, fastpeft.patch)):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        base = quietly(library.prepare_model_for_kbit_training, load(kind, torch.bfloat16), **options)
        torch.manual_seed(4)
        model = wrap(base, library.LoraConfig(**LORA, task_type="CAUSAL_LM")).train()
        if losses:
            fastpeft.fuse(model, "projections")
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 2e-3)
        losses.append([])
        for _ in range(20):
            loss = model(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert len(seen) >= 19 * 2 * len(SIZES)  # a checkpointed segment's forward runs twice
    close(*map(torch.stack, reversed(losses)), 2e-2)
    assert losses[1][-1] < 0.9 * losses[1][0]


@WAYS
def test_half_precision_and_autocast(way, seen):
    model, alone = pair("nf4", way)
    for each in (model, alone):
        each.train()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = outcome(model), outcome(alone)
    assert seen == SIZES
    assert_alike(found, expected, 5e-2)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, n) for n in (24, 16, 40))

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x), self.c(x)), -1)


def three(quantised_names, **settings) -> nn.Sequential:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=3, target_modules=["a", "b", "c"], **settings)
    model = fastpeft.patch(nn.Sequential(Three()), config)
    randomise(model)
    return fastpeft.quantise_base_fp8(model, [f"0.{name}" for name in quantised_names])


def step_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = model(x)
    y.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


@pytest.mark.parametrize(
    ("names", "dropout", "sizes"),
    [("abc", 0.2, [3]), ("ab", 0.2, [2]), ("bc", 0.2, [2]), ("a", 0.2, [2]), ("ac", 0.0, [2]), ("ac", 0.2, [])],
)
def test_dense_and_quantised_projections_beside_each_other(names, dropout, sizes, seen):
    """Those of one kind are one op, but for what would draw dropout before its turn."""
    model = three(names, lora_dropout=dropout).train()
    alone, x = copy.deepcopy(model), torch.randn(5, 32)
    fastpeft.fuse(model, "projections")
    model(x)
    for _ in range(2):
        seen.clear()
        assert_alike(step_of(model, x), step_of(alone, x))
        assert seen == sizes


def test_what_the_op_does_not_add_goes_layer_by_layer(seen):
    """A bias of the adapter."""
    model = three("abc", lora_bias=True)
    alone, x = copy.deepcopy(model), torch.randn(5, 32)
    fastpeft.fuse(model, "projections")
    model(x)
    assert_alike(step_of(model, x), step_of(alone, x))
    assert seen == []


@WAYS
def test_a_hook_on_the_base(way, seen):
    """Of peft's layer the base has calls of its own, in which the hook runs; of ours it is the layer."""
    model, alone = pair("nf4", way)
    for each in (model, alone):
        k = attention_of(each).k_proj
        getattr(k, "base_layer", k).register_forward_hook(lambda module, args, output: output * 2)
    for _ in range(2):
        assert_alike(outcome(model), outcome(alone))
    assert seen[-2:] == [3 if way == "native" else 2, 2]


@WAYS
def test_adapters_are_switched_off_and_on(way, seen):
    model, alone = pair("int8", way)
    found = []
    for each in (model, alone):
        with each.disable_adapter() if way == "peft" else fastpeft.disable_adapter(each):
            found.append(called(each))
    assert torch.equal(*found) and seen == []
    assert_alike(outcome(model), outcome(alone))
    assert seen == SIZES
    fastpeft.unfuse(model)
    assert not siblings_of(model)
    seen.clear()
    assert_alike(outcome(model), outcome(alone), 0.0)
    assert seen == []


def test_one_graph(seen):
    torch._dynamo.reset()
    model = three("abc", lora_dropout=0.5).train()
    alone, x = copy.deepcopy(model), torch.randn(5, 32)
    fastpeft.fuse(model, "projections")
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert step_of(compiled, x)["y"].isfinite().all() and seen == [3]
    for each in (model, alone):
        each.eval()
    seen.clear()
    found = {name.removeprefix("_orig_mod."): each for name, each in step_of(compiled, x).items()}
    assert seen == [3]
    assert_alike(found, step_of(alone, x))


def test_results_that_nothing_uses_cost_no_weight(seen, monkeypatch):
    """Their base products are computed with the others', but not their gradients."""
    model, x = three("abc"), torch.randn(5, 32)
    fastpeft.fuse(model, "projections")
    model(x)
    path, made = sys.modules["fastpeft.ops.fp8_linear"], []
    shipped = path.dequantise_rows
    monkeypatch.setattr(path, "dequantise_rows", lambda *given: made.append(given) or shipped(*given))
    model[0].forward = lambda x: [model[0].a(x), model[0].b(x), model[0].c(x)][0]
    y = model(x.requires_grad_())
    made.clear()
    y.sum().backward()
    assert len(made) == 1 and seen == [3]
