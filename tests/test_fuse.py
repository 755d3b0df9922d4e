"""`fuse`: projections that read one tensor are one op, on every kind of model, and compute what they did before, as HF
peft's do beside them."""

import copy
import threading

import pytest
import torch
import transformers

import fastpeft
from fastpeft import PatchError
from fastpeft.tuners import siblings
from tests.compiled import adapted as of_one_layer
from tests.compiled import stepped
from tests.fused import SIZES, adapted, assert_alike, called, fused, outcome, pair
from tests.fused import seen as seen
from tests.matrix import Cell, ours, peft_s
from tests.models import batch, batch_for, differences, snapshot, tiny
from tests.peft_pair import assert_same_step, patched_pair, quietly, randomise

WAYS = pytest.mark.parametrize("way", ["native", "peft"])
FAMILIES = {  # family, task, targets, the sizes of the ops in a call
    "llama": ("llama", "CAUSAL_LM", "all-linear", SIZES),
    "qwen2": ("qwen2", "CAUSAL_LM", ["q_proj", "k_proj", "v_proj"], [3, 3]),
    "q and v": ("llama", "CAUSAL_LM", ["q_proj", "v_proj", "o_proj"], [2, 2]),
    "mixtral": ("mixtral", "CAUSAL_LM", ["q_proj", "k_proj", "v_proj", "o_proj"], [3, 3]),
    "opt": ("opt", "CAUSAL_LM", "all-linear", [3, 3]),
    "gpt2": ("gpt2", "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"], []),
    "bert": ("bert", "SEQ_CLS", ["query", "key", "value"], [3, 3]),
    "t5": ("t5", "SEQ_2_SEQ_LM", ["q", "k", "v", "wo"], [3, 3, 3, 2, 3, 2]),
    "bart": ("bart", "SEQ_2_SEQ_LM", ["q_proj", "k_proj", "v_proj"], [3, 3, 3, 2, 3, 2]),
}


@pytest.mark.parametrize(("family", "task", "targets", "sizes"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_as_in_peft(family, task, targets, sizes, seen):
    """Across attention the query is the decoder's, and key and value are the encoder's."""
    hf, model = patched_pair(family, {"target_modules": targets}, task=task)
    randomise(hf, model)
    assert fastpeft.fuse(model, "projections") is model
    inputs = batch_for(family, task)
    with torch.no_grad():
        model(**inputs)
    assert seen == []  # the first call is watched
    with torch.no_grad():
        model(**inputs)
    assert sorted(seen) == sorted(sizes)
    seen.clear()
    assert_same_step(hf, model, inputs)
    assert sorted(seen) == sorted(2 * sizes)


SETTINGS = {
    "dropout": {"lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"q_proj": 2, "v_proj": 7, "up_proj": 1}, "alpha_pattern": {"k_proj": 3}},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]},
}


@WAYS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_is_as_without(settings, way, seen):
    """With the very masks of dropout."""
    model, alone = pair(way, **settings)
    expected = outcome(alone.train())
    assert seen == []
    found = outcome(model.train())
    assert seen == SIZES
    assert len(found) > 20
    assert_alike(found, expected)


def test_weights_that_are_trained_get_their_gradients(seen):
    model, alone = pair()
    for each in (model, alone):
        each.requires_grad_(True)
    expected, found = outcome(alone), outcome(model)
    assert seen == SIZES and "model.layers.1.self_attn.k_proj.weight" in found
    assert_alike(found, expected)


def test_conv1d_siblings(seen):
    """GPT-2's layer, of which a module could have several."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (transformers.pytorch_utils.Conv1D(n, 8) for n in (6, 4))

        def forward(self, x):
            return torch.cat((self.first(x), self.second(x)), -1)

    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.2)
    alone = fastpeft.patch(torch.nn.Sequential(Both()), config).train()
    randomise(alone)
    model, x = fastpeft.fuse(copy.deepcopy(alone), "projections"), torch.randn(3, 5, 8)
    model(x)
    found = []
    for each in (model, alone):
        torch.manual_seed(1)
        y = each(x)
        y.square().sum().backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert seen == [2]
    assert_alike(*found)


CELLS = [Cell("llama", "CAUSAL_LM", "lora"), Cell("bert", "SEQ_CLS", "lora")]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_of_twenty_steps_are_peft_s(cell, seen):
    found = []
    for library in (peft_s(), ours(hf_quirks=True)):
        torch.manual_seed(11)
        model = quietly(library.wrap, cell.base(), cell).eval()
        if found:
            fastpeft.fuse(model, "projections")
        learned = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
        optimiser, losses = torch.optim.AdamW(learned, lr=1e-3), []
        for _ in range(20):
            optimiser.zero_grad()
            loss = model(**cell.inputs()).loss
            loss.backward()
            losses.append(loss.detach())
            optimiser.step()
        found.append(torch.stack(losses))
    assert len(seen) >= 19 * 2
    assert (found[1] - found[0]).abs().max() <= 1e-4 * found[0].abs().max()
    assert found[1][-1] < found[1][0]


@WAYS
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_from_the_first_step_on(way, kwargs, seen):
    """What a segment computed in forward it computes again, also where its projections were watched in between."""
    model = adapted(way, lora_dropout=0.3)
    alone = copy.deepcopy(model)
    fastpeft.fuse(model, "projections")
    for each in (model, alone):
        each.train()
        if kwargs:
            each.gradient_checkpointing_enable(kwargs)
            each.enable_input_require_grads()
    steps = [], []
    for step in range(4):
        for each, losses in zip((alone, model), steps, strict=True):
            losses.append(outcome(each, seed=step))
    assert set(seen) == {2, 3} and len(seen) == (2 if kwargs else 1) * 3 * 4
    for expected, found in zip(*steps, strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_checkpointed_calls_are_open_at_once(reentrant, seen):
    """The first was watched, and is repeated after later ones; then they go together."""
    model = adapted().train()
    fastpeft.fuse(model, "projections")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for round_ in range(2):
        losses = [model(**batch()).loss for _ in range(3)]
        for loss in losses:
            loss.backward()
        assert seen == ([] if not round_ else 6 * SIZES) or sorted(seen) == sorted(6 * SIZES)
    for siblings_ in {id(m._fastpeft_siblings): m._fastpeft_siblings for m in model.modules() if _joined(m)}.values():
        assert not siblings_.open


def _joined(module) -> bool:
    return siblings.KEY in module.__dict__


def test_a_model_that_is_checkpointed_is_evaluated_meanwhile(seen):
    """Between a forward and its backward the projections are used otherwise, so that they are watched once more."""
    model = fused(adapted()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    expected = outcome(model)
    loss = model(**batch()).loss
    for layer in model.model.layers:
        layer.self_attn.k_proj._fastpeft_siblings.surprised()
    called(model)
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_alike({"loss": loss.detach(), **gradients}, {k: v for k, v in expected.items() if k != "logits"})


@WAYS
def test_generation_with_a_cache(way, seen):
    model, alone = pair(way)
    inputs = {"input_ids": batch()["input_ids"][:1], "max_new_tokens": 6, "do_sample": False}
    found = quietly(model.generate, **inputs)
    assert len(seen) == 6 * 4
    assert torch.equal(found, quietly(alone.generate, **inputs))


@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, training, seen):
    model, alone = (each.train(training) for each in pair())
    with mode():
        assert_alike(
            dict(enumerate(model(**batch(length=n)).logits for n in (3, 5, 9))),
            dict(enumerate(alone(**batch(length=n)).logits for n in (3, 5, 9))),
        )
    assert seen == 3 * SIZES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WAYS
def test_half_precision_and_autocast(way, dtype, seen):
    model, alone = pair(way)
    with torch.autocast("cpu", dtype):
        assert_alike(outcome(model), outcome(alone), rtol=0.05)
    assert seen == SIZES
    seen.clear()
    found = outcome(model.to(dtype)), outcome(alone.to(dtype))
    assert seen == SIZES and found[0]["logits"].dtype == dtype
    assert_alike(*found, rtol=0.05)


@pytest.mark.parametrize("before", [False, True], ids=["", "called before"])
def test_compiled_as_one_graph(before, seen):
    """What is compiled before any call goes layer by layer; after one it is one op."""
    alone = of_one_layer("lora", target_modules="all-linear")
    model = fastpeft.fuse(copy.deepcopy(alone), "projections")
    if before:
        called(model)
    torch._dynamo.reset()
    found = (
        stepped(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch()),
        stepped(alone, alone, batch()),
    )
    assert_alike(*({"loss": loss.detach(), **gradients} for loss, gradients in found))
    assert seen == ([3, 2] if before else [])
    for module in model.modules():
        assert not _joined(module) or module._fastpeft_siblings.traced is None


def test_a_module_of_peft_s_is_compiled_as_one_graph(seen):
    model, alone = (each.base_model.model.model.layers[0].mlp for each in pair("peft"))
    torch._dynamo.reset()
    x, found = torch.randn(3, 32, requires_grad=True), []
    for run, each in ((torch.compile(model, backend="aot_eager", fullgraph=True), model), (alone, alone)):
        y = run(x)
        learned = {name: p for name, p in each.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(y.square().sum(), [x, *learned.values()])
        found.append(dict(zip(["y", "x", *learned], [y.detach(), *gradients], strict=True)))
    assert_alike(*found)
    assert seen == [2]


def test_two_threads(seen):
    model, alone = pair()
    expected = [model(**batch(length=n)).logits.detach() for n in (5, 9)]
    found = [[], []]

    def work(which: int) -> None:
        for _ in range(4):
            found[which].append(model(**batch(length=(5, 9)[which])).logits.detach())

    seen.clear()
    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(seen) == sorted(8 * SIZES)
    for which, each in enumerate(found):
        assert len(each) == 4 and all(torch.equal(logits, expected[which]) for logits in each)


@WAYS
def test_unfuse_and_unpatch_leave_nothing(way):
    model = adapted(way)
    before = snapshot(model)
    fused(model)
    assert differences(before, snapshot(model)) != []
    assert fastpeft.unfuse(model) is model
    assert differences(before, snapshot(model)) == []
    base = tiny()
    before = snapshot(base)
    if way == "native":
        fastpeft.patch(base, fastpeft.LoraConfig(r=2, target_modules="all-linear"))
        fastpeft.unpatch(fused(base))
        assert differences(before, snapshot(base)) == []
    else:
        fastpeft.unpatch(fused(model))
        assert not any(map(_joined, model.modules()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fusing_twice_is_fusing_once():
    model = fused(adapted())
    before = snapshot(model)
    runs = model.model.layers[0].mlp.up_proj._fastpeft_siblings.runs
    fastpeft.fuse(model, "projections")
    assert differences(before, snapshot(model)) == [] and runs
    assert model.model.layers[0].mlp.up_proj._fastpeft_siblings.runs is runs


def test_projections_that_are_adapted_later_join(seen):
    model = fused(adapted(target_modules=["q_proj", "k_proj"]))
    quietly(model.add_adapter, "more", fastpeft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    fastpeft.set_adapter(model, "more")
    called(model)
    assert seen == [2, 2]
    fused(model)
    seen.clear()
    called(model)
    assert seen == [3, 3]
    fastpeft.unfuse(model)
    assert not any(map(_joined, model.modules()))


@pytest.mark.parametrize("call", [fastpeft.fuse, fastpeft.unfuse])
def test_what_cannot_be_fused_is_refused(call):
    import peft

    with pytest.raises(PatchError, match="is not patched"):
        call(tiny())
    with pytest.raises(PatchError, match="there is no fusion 'attention'; there are 'projections'"):
        call(adapted(), "projections", "attention")
    model = quietly(peft.get_peft_model, tiny(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PatchError, match="peft's adapters in this model are not patched"):
        call(model)


def test_a_refused_fusion_changes_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(PatchError):
        fastpeft.fuse(model, "projections", "no")
    assert differences(before, snapshot(model)) == []


@WAYS
def test_the_report_says_what_is_one_op(way, seen):
    model = fastpeft.fuse(adapted(way, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]), "projections")
    reasons = {row.path.split(".")[-1]: row.reason for row in fastpeft.report(model).layers if "lora" in row.op}
    unknown = "; one op with its neighbours if a call shows that they read one tensor"
    assert {name for name, why in reasons.items() if why.endswith(unknown)} == {"q_proj", "v_proj", "o_proj"}
    called(model)
    assert str(fastpeft.report(model)).count("q_proj, v_proj as one op, predicted to pay on GPUs") == 1
    reasons = {row.path.split(".")[-1]: row.reason for row in fastpeft.report(model).layers if "lora" in row.op}
    assert {name for name, why in reasons.items() if "as one op" in why} == {"q_proj", "v_proj"}
    fastpeft.unfuse(model)
    assert "one op" not in str(fastpeft.report(model))
