"""What happens to a fused model: hooks and inputs that change, adapters that come, go and are mixed, merging, copying,
saving, offloading, and what is broken off in the middle. It computes what it computes without, and holds nothing."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import fastpeft
from fastpeft.tuners import siblings
from tests.fused import SIZES, adapted, assert_alike, called, fused, outcome, pair
from tests.fused import seen as seen
from tests.models import batch, tiny
from tests.peft_pair import quietly, randomise

WAYS = pytest.mark.parametrize("way", ["native", "peft"])


def attention_of(model: nn.Module) -> nn.Module:
    """The last layer's, whose input is not the embeddings'."""
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.self_attn"))


def siblings_of(model: nn.Module) -> list[siblings.Siblings]:
    found = (module.__dict__.get(siblings.KEY) for module in model.modules())
    return list({id(each): each for each in found if each is not None}.values())


def assert_nothing_is_held(model: nn.Module) -> None:
    assert getattr(siblings._threads, "call", None) is None
    assert all(each.traced is None and not each.open for each in siblings_of(model))


# Hooks and inputs


def _shift(module, args):
    return args[0] + 1.0


def _add(module, args, output):
    args[0].add_(0.25)


def _doubled(gradients):
    return tuple(None if each is None else each * 2 for each in gradients)


HOOKS = {
    "an input": lambda layer: layer.register_forward_pre_hook(_shift),
    "an output": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 2),
    "backward": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: _doubled(dx)),
    "backward, before": lambda layer: layer.register_full_backward_pre_hook(lambda module, dy: _doubled(dy)),
}


@pytest.mark.parametrize(("way", "which"), [("native", "q_proj"), ("native", "k_proj"), ("peft", "k_proj")])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_of_projections(hook, which, way, seen):
    """Set after the calls were watched, and taken off again."""
    both = pair(way)
    for rounds in range(2):
        handles = [hook(getattr(attention_of(model), which)) for model in both]
        seen.clear()
        for _ in range(2):
            assert_alike(*map(outcome, both))
        assert seen.count(2) >= 4
        for handle in handles:
            handle.remove()
        assert_alike(*map(outcome, both))
        assert siblings_of(both[0])[0].surprises <= siblings.PATIENCE, rounds
    assert_nothing_is_held(both[0])


@WAYS
def test_a_hook_that_changes_what_the_next_will_read(way, seen):
    model, alone = pair(way)
    for each in (model, alone):
        attention_of(each).q_proj.register_forward_hook(_add)
    for _ in range(3):
        torch.testing.assert_close(called(model), called(alone), rtol=1e-5, atol=1e-5)
    q = attention_of(model).q_proj
    assert q.__dict__[siblings.KEY].runs[q] == [q]
    seen.clear()
    called(model)
    assert 2 in seen and seen.count(3) == 1  # the other layer's, and k and v of this one


class Odd(nn.Module):
    """Calls its projections as it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n) for n in (6, 6, 6))
        self.plan = lambda self, x: self.a(x) + self.b(x) + self.c(x)

    def forward(self, x):
        return self.plan(self, x)


PLANS = {
    "as ever": lambda self, x: self.a(x) + self.b(x) + self.c(x),
    "other order": lambda self, x: self.c(x) + self.a(x) + self.b(x),
    "one is not called": lambda self, x: self.a(x) + self.c(x),
    "the first is not called": lambda self, x: self.b(x) + self.c(x),
    "one is called twice": lambda self, x: self.a(x) + self.b(x) + self.c(x) + self.b(x),
    "the first is called twice": lambda self, x: self.a(x) + self.a(x) + self.b(x) + self.c(x),
    "another tensor": lambda self, x: self.a(x) + self.b(x.clone() * 2) + self.c(x),
    "another tensor of the same values": lambda self, x: self.a(x) + self.b(x.view_as(x)) + self.c(x),
    "without a graph": lambda self, x: self.a(x) + _no_grad(self.b, x) + self.c(x),
    "nothing at all": lambda self, x: x[..., :6] * 2,
}


def in_place(self, x):
    y = x * 1.0
    return self.a(y) + self.b(y.add_(1)) + self.c(y)


def _no_grad(function, x):
    with torch.no_grad():
        return function(x)


def odd() -> nn.Module:
    torch.manual_seed(0)
    model = fastpeft.patch(nn.Sequential(Odd()), fastpeft.LoraConfig(r=2, target_modules=["a", "b", "c"])).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_calls_that_turn_out_otherwise(plan, seen):
    """Watched as they always were, then as they are once, then as ever, then otherwise for good."""
    alone = odd()
    model, x = fastpeft.fuse(copy.deepcopy(alone), "projections"), torch.randn(3, 8)
    for turn in [0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]:
        for each in (model, alone):
            each[0].plan = plan if turn else PLANS["as ever"]
        found = []
        for each in (model, alone):
            each.zero_grad()
            x_ = x.clone().requires_grad_()
            y = each(x_)
            y.square().sum().backward()
            gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), "x": x_.grad, **gradients, "also": y.detach() * 2})
        assert_alike(*found)
        assert_nothing_is_held(model)
    assert seen[0] == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_in_place_is_seen_without_gradients(mode, seen):
    """Of tensors without versions, too, where the calls are watched."""
    alone = odd()
    model, x = fastpeft.fuse(copy.deepcopy(alone), "projections"), torch.randn(3, 8)
    for each in (model, alone):
        each[0].plan = in_place
    with mode():
        for _ in range(3):
            torch.testing.assert_close(model(x), alone(x))
    assert set(seen) == {2}  # b and c


def test_projections_called_outside_their_parent(seen):
    model = fastpeft.fuse(odd(), "projections")
    x = torch.randn(3, 8)
    for _ in range(3):
        model[0].a(x) + model[0].b(x)
        assert_nothing_is_held(model)
    model(x), model(x)
    expected = model[0].b(x)
    assert seen == [3] and torch.equal(expected, model[0].b(x))


def test_modules_that_have_no_call_of_their_own(seen):
    """The parts of a list are called by somebody else: nothing is watched, and nothing piles up."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

        def forward(self, x):
            return self.parts[0](x) + self.parts[1](x)

    model = fastpeft.patch(Holder(), fastpeft.LoraConfig(r=2, target_modules=["0", "1"]))
    fastpeft.fuse(model, "projections")
    for _ in range(3):
        x = torch.randn(3, 8)
        gone = weakref.ref(x)
        model(x)
        del x
        gc.collect()
        assert gone() is None
    assert seen == []
    assert_nothing_is_held(model)


# What is broken off


class Broken(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Broken], ids=["error", "interrupt"])
@pytest.mark.parametrize("watching", [True, False], ids=["watching", ""])
def test_what_is_broken_off_holds_nothing_for_long(error, watching, seen):
    model = odd()
    fastpeft.fuse(model, "projections")
    x = torch.randn(3, 8, requires_grad=True)
    if not watching:
        model(x)
    expected = odd()(x)

    def fail(module, args, output):
        raise error

    handle = model[0].b.register_forward_hook(fail)
    with pytest.raises(error):
        model(x)
    handle.remove()
    if error is RuntimeError:
        assert_nothing_is_held(model)
    else:  # which torch calls no hooks for: any fused module's next call lets go of it
        held = siblings._threads.call
        assert held.of is model[0].a.__dict__[siblings.KEY]
        reference, other = weakref.ref(held), fastpeft.fuse(odd(), "projections")
        del held
        other(x)
        assert reference() is None
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert_nothing_is_held(model)


def test_an_error_in_a_projection_leaves_the_others_right():
    model, alone = pair()
    attention = attention_of(model)
    with pytest.raises(RuntimeError):
        attention.q_proj(torch.randn(2, 3, 31))
    assert_alike(outcome(model), outcome(alone))


def test_nothing_is_held_after_a_step():
    model = fused(adapted()).train()
    inputs = batch()
    found = []
    handle = attention_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: found.append(weakref.ref(kwargs["hidden_states"])), with_kwargs=True
    )
    model(**inputs).loss.backward()
    handle.remove()
    gc.collect()
    assert len(found) == 1 and found[0]() is None
    assert_nothing_is_held(model)


# Adapters


@WAYS
def test_adapters_come_and_go(way, seen, tmp_path):
    both = [adapted(way), adapted(way)]
    fused(both[0])
    for model in both:
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]}
        torch.manual_seed(3)
        if way == "native":
            quietly(model.add_adapter, "b", fastpeft.LoraConfig(**settings))
        else:
            import peft

            quietly(model.add_adapter, "b", peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        model.set_adapter("b")
        randomise(model, seed=5)
    assert_alike(*map(outcome, both))
    assert seen == [2, 2]
    for names in (["default", "b"], "default"):
        for model in both:
            if way == "native":
                fastpeft.set_adapter(model, names)
            else:
                model.base_model.set_adapter(names)
        seen.clear()
        assert_alike(*map(outcome, both))
        # in both layers k, v or gate alone have one adapter of the two, which is one projection each
        assert seen == ([] if isinstance(names, list) else SIZES)
    with both[0].disable_adapter(), both[1].disable_adapter():
        torch.testing.assert_close(called(both[0]), called(both[1]))
    seen.clear()
    torch.testing.assert_close(called(both[0]), called(both[1]))
    assert seen == SIZES
    for model in both:
        model.save_pretrained(tmp_path / str(len(list(tmp_path.iterdir()))))
        model.delete_adapter("default")
        model.set_adapter("b")
    assert_alike(*map(outcome, both))
    files = [path.read_bytes() for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert files[: len(files) // 2] == files[len(files) // 2 :] != []


def test_use_adapter_and_mixed_batches(seen):
    model, alone = adapted(), adapted()
    for each in (model, alone):
        torch.manual_seed(3)
        quietly(each.add_adapter, "b", fastpeft.LoraConfig(r=2, target_modules="all-linear"))
        fastpeft.set_adapter(each, "b")
        randomise(each, seed=5)
        fastpeft.set_adapter(each, "default")
    fused(model)
    for names in ({"adapter_names": ["default", "b"]}, {"adapter_names": ["b", "__base__"]}, {}):
        seen.clear()
        with torch.no_grad():
            torch.testing.assert_close(*(each(**batch(), **names).logits for each in (model, alone)))
        assert seen == ([] if names else SIZES)
    with fastpeft.use_adapter(model, "b"), fastpeft.use_adapter(alone, "b"):
        seen.clear()
        torch.testing.assert_close(called(model), called(alone))
        assert seen == SIZES


@WAYS
def test_merging(way, seen):
    both = pair(way)
    expected, before = [called(model) for model in both], list(seen)
    merge = [model if way == "native" else model.base_model for model in both]
    for each in merge:
        fastpeft.merge(each) if way == "native" else each.merge_adapter()
    torch.testing.assert_close(called(both[0]), called(both[1]))
    assert seen == before
    for each in merge:
        fastpeft.unmerge(each) if way == "native" else each.unmerge_adapter()
    exact = {"rtol": 0, "atol": 0} if way == "native" else {}  # peft subtracts what it had added
    for model, logits in zip(both, expected, strict=True):
        torch.testing.assert_close(called(model), logits, **exact)
    if way == "native":
        plain = fastpeft.merge_and_unload(both[0])
        assert not siblings_of(plain) and not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        torch.testing.assert_close(called(plain), expected[1], rtol=1e-4, atol=1e-4)


@WAYS
def test_an_adapter_is_loaded_into_a_fused_model(way, tmp_path, seen):
    adapted(way).save_pretrained(tmp_path)
    both = pair(way)
    for model in both:
        randomise(model, seed=77)
        quietly(model.load_adapter, tmp_path, "again")
        model.set_adapter("again")
    seen.clear()
    torch.testing.assert_close(called(both[0]), called(both[1]))
    torch.testing.assert_close(called(both[0]), called(adapted(way)))
    assert seen == 2 * SIZES


@pytest.mark.parametrize("way", ["native", "peft"])
def test_dora_goes_layer_by_layer(way, seen):
    both = pair(way, use_dora=True)
    assert_alike(*map(outcome, both))
    assert seen == []


def test_adalora(seen):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        config = fastpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules="all-linear")
        models.append(quietly(fastpeft.patch, tiny(), config).eval())
        randomise(models[-1])
    fused(models[0])
    assert_alike(*map(outcome, models))


# Copies


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("called_before", [True, False], ids=["called", "not called"])
def test_copies_are_fused_and_their_own(copied, called_before, seen):
    model = fastpeft.fuse(adapted(), "projections")
    if called_before:
        called(model)
    other = copied(model)
    assert {id(each) for each in siblings_of(model)}.isdisjoint(map(id, siblings_of(other)))
    members = {id(member) for each in siblings_of(other) for member in each.members}
    assert members <= set(map(id, other.modules()))
    called(other)
    seen.clear()
    expected, found = outcome(model), outcome(other)
    assert_alike(found, expected)
    fastpeft.unfuse(model)
    seen.clear()
    assert_alike(outcome(other), expected)
    assert seen == SIZES and siblings_of(model) == []


def test_weights_that_accelerate_keeps_elsewhere(seen):
    model, alone = adapted(), adapted()
    expected = called(alone)
    fused(model)
    cpu_offload(model, "cpu")
    seen.clear()
    for _ in range(2):
        torch.testing.assert_close(called(model), expected)
    later = cpu_offload(adapted(), "cpu")
    fastpeft.fuse(later, "projections")
    for _ in range(2):
        torch.testing.assert_close(called(later), expected)
    assert seen == []
