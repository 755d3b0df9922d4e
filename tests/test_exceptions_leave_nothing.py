"""What is raised in the middle of something leaves nothing behind: Ctrl-C at any line of the library, an error in a
hook, in backward, while generating. What promises all or nothing is all or nothing; what does not can be done once
more; and `unpatch` always gives the base back bit for bit."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.restoring import restore_adapter
from fastpeft.scoped import scoped
from tests.counting import count, how_many
from tests.interrupted import interrupted, interrupted_in, left_behind, lines_of, portrait, spread, telling, unlike
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import quietly, randomise, result

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda: fastpeft.LoraConfig(r=2, **TARGETS),
    "dora": lambda: fastpeft.LoraConfig(
        r=2, use_dora=True, init_lora_weights="pissa", bias="all", modules_to_save=["lm_head"], **TARGETS
    ),
    "adalora": lambda: fastpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
    "prefix": lambda: fastpeft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: fastpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: fastpeft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "llama-adapter": lambda: fastpeft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}
BESIDE_LORA = [kind for kind in CONFIGS if kind != "adalora"]  # which has other layers on the same modules


def having(*kinds: str, swapped: bool = False) -> nn.Module:
    """A model with these adapters, a, b and so on, of which the first is active."""
    model = tiny()
    for name, kind in zip("abc", kinds, strict=False):
        torch.manual_seed(ord(name))
        if name == "a":
            quietly(fastpeft.patch, model, CONFIGS[kind](), adapter_name=name)
        else:
            quietly(model.add_adapter, name, CONFIGS[kind]())
    randomise(model, seed=99 if swapped else 13)
    return model


def merged(*kinds: str) -> nn.Module:
    """The same, with the first merged into the base."""
    model = having(*kinds)
    quietly(fastpeft.merge, model)
    return model


def stepped() -> nn.Module:
    """A model with AdaLoRA, and gradients."""
    model = having("adalora")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], str]:
    """The directory of an adapter of this kind, whose values no model of `having` has."""

    @functools.cache
    def directory(kind: str) -> str:
        path = str(tmp_path_factory.mktemp(kind))
        fastpeft.save_adapter(having(kind, swapped=True), path)
        return path

    return directory


@dataclass
class Case:
    """`act(model, directory)` on what `make()` gives; directory: of an adapter of this kind, or None."""

    make: Callable[[], nn.Module]
    act: Callable
    directory: str | None = None


def _patch(kind: str) -> Case:
    return Case(tiny, lambda model, _: (torch.manual_seed(5), fastpeft.patch(model, CONFIGS[kind]())))


def _add(kind: str) -> Case:
    def act(model, _):
        torch.manual_seed(5)
        model.add_adapter("z", CONFIGS[kind]())

    return Case(lambda: having("lora"), act)


ALL_OR_NOTHING = {
    **{f"patch-{kind}": _patch(kind) for kind in CONFIGS},
    **{f"load-{kind}": Case(tiny, fastpeft.load_adapter, kind) for kind in CONFIGS},
    **{f"add-{kind}": _add(kind) for kind in BESIDE_LORA},
    **{
        f"load-another-{kind}": Case(
            lambda: having("lora"), lambda model, path: fastpeft.load_adapter(model, path, adapter_name="z"), kind
        )
        for kind in BESIDE_LORA
    },
    "merge": Case(lambda: having("lora"), lambda model, _: fastpeft.merge(model)),
    "merge-dora": Case(lambda: having("dora"), lambda model, _: fastpeft.merge(model)),
    "hotswap": Case(lambda: having("lora"), lambda model, path: fastpeft.hotswap_adapter(model, path, "a"), "lora"),
    "prepare-hotswap": Case(
        lambda: having("lora"),
        lambda model, _: fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=8),
    ),
    "restore": Case(lambda: having("lora"), lambda model, path: restore_adapter(model, path), "lora"),
    "weighted": Case(
        lambda: having("lora", "lora"),
        lambda model, _: model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "z", combination_type="linear"),
    ),
}

# What promises nothing to one who interrupts it: once more, and it is done.
ONCE_MORE = {
    **{f"unpatch-{kind}": Case(lambda kind=kind: having(kind), lambda model, _: _unpatched(model)) for kind in CONFIGS},
    "unpatch-merged": Case(lambda: merged("dora"), lambda model, _: _unpatched(model)),
    "set": Case(lambda: having("lora", "dora", "prefix"), lambda model, _: model.set_adapter(["b", "c"])),
    "set-merged": Case(lambda: merged("lora", "prefix"), lambda model, _: model.set_adapter("b")),
    "delete": Case(lambda: having("lora", "dora", "prefix"), lambda model, _: _deleted(model, "b")),
    "delete-active": Case(lambda: having("lora", "prefix", "prompt"), lambda model, _: _deleted(model, "a")),
    "delete-prefix": Case(lambda: having("lora", "prefix"), lambda model, _: _deleted(model, "b")),
    "delete-prompt": Case(lambda: having("lora", "p-tuning"), lambda model, _: _deleted(model, "b")),
    "delete-only": Case(lambda: having("dora"), lambda model, _: _deleted(model, "a")),
    "unmerge": Case(lambda: merged("dora"), lambda model, _: fastpeft.unmerge(model)),
}


def _unpatched(model: nn.Module) -> None:
    if "_fastpeft" in model.__dict__:
        fastpeft.unpatch(model)


def _deleted(model: nn.Module, name: str) -> None:
    if name in model.peft_config:
        model.delete_adapter(name)


def places_of(case: Case, directory: str | None) -> tuple[list[int], dict]:
    """Where to interrupt a case, and the portrait of the model after it has been let through."""
    models = case.make(), case.make()
    for model in models:  # the first time some things are found that are kept for the second
        places = lines_of(lambda model=model: quietly(case.act, model, directory))
    return spread(telling(places), how_many(5, 60)), portrait(models[1])


@functools.cache
def base() -> dict:
    return portrait(tiny())


def assert_unpatching_restores(model: nn.Module, at: int) -> None:
    quietly(_unpatched, model)
    assert unlike(portrait(model), base()) == [], at
    assert left_behind() == [], at


@pytest.mark.parametrize("name", ALL_OR_NOTHING)
def test_what_is_interrupted_has_been_done_or_has_not(name, saved):
    case = ALL_OR_NOTHING[name]
    directory = saved(case.directory) if case.directory else None
    places, after = places_of(case, directory)
    outcomes = set()
    for at in places:
        model = case.make()
        before = snapshot(model)
        assert interrupted(lambda model=model: quietly(case.act, model, directory), at), at
        found = "done" if unlike(portrait(model), after) == [] else differences(before, snapshot(model))
        assert found in ("done", []), (at, found)
        outcomes.add(bool(found))
        assert_unpatching_restores(model, at)
        count("interruptions survived")
    assert False in outcomes


@pytest.mark.parametrize("name", ONCE_MORE)
def test_what_is_interrupted_can_be_done_once_more(name):
    case = ONCE_MORE[name]
    places, after = places_of(case, None)
    for at in places:
        models = case.make(), case.make()
        for model in models:
            assert interrupted(lambda model=model: quietly(case.act, model, None), at), at
        quietly(case.act, models[0], None)
        assert unlike(portrait(models[0]), after) == [], at
        assert_unpatching_restores(models[1], at)
        count("interruptions survived")


@pytest.mark.parametrize(
    "make",
    [lambda: having("lora"), lambda: having("dora"), lambda: merged("dora"), lambda: having("lora", "prefix")],
    ids=["lora", "dora", "merged", "beside-prefix"],
)
def test_an_interrupted_merge_and_unload_is_done_once_more(make):
    def act(model: nn.Module) -> None:
        if "_fastpeft" in model.__dict__:
            model.merge_and_unload()

    places, after = places_of(Case(make, lambda model, _: act(model)), None)
    for at in places:
        model = make()
        assert interrupted(lambda model=model: quietly(act, model), at), at
        quietly(act, model)
        assert unlike(portrait(model), after) == [] and left_behind() == [], at
        assert "_fastpeft" not in model.__dict__ and type(model) is type(tiny())
        count("interruptions survived")


def test_an_interrupted_save_leaves_the_model_and_the_old_files(tmp_path):
    model, other = having("lora"), having("lora", swapped=True)
    fastpeft.save_adapter(other, tmp_path)
    old = fastpeft.adapter_state_dict(other)
    for _ in range(2):
        places = lines_of(lambda: fastpeft.save_adapter(model, tmp_path))
    seen = []
    for at in spread(telling(places), how_many(12, 200)):
        fastpeft.save_adapter(other, tmp_path)
        before = snapshot(model)
        assert interrupted(lambda: fastpeft.save_adapter(model, tmp_path), at)
        assert differences(before, snapshot(model)) == [] and left_behind() == []
        loaded = fastpeft.adapter_state_dict(fastpeft.load_adapter(tiny(), tmp_path))
        which = [
            all(torch.equal(loaded[key], value) for key, value in held.items())
            for held in (old, fastpeft.adapter_state_dict(model))
        ]
        assert sum(which) == 1, at
        seen.append(which[0])
        count("interruptions survived")
    assert seen[0] and not seen[-1]


def test_an_interrupted_step_of_adalora_s_schedule_is_taken_again():
    after = stepped()
    fastpeft.update_and_allocate(after, 6)
    model = stepped()
    places = telling(lines_of(lambda: fastpeft.update_and_allocate(model, 6)))
    for at in spread(places, how_many(5, 60)):
        model = stepped()
        assert interrupted(lambda model=model: fastpeft.update_and_allocate(model, 6), at)
        for parameter in model.parameters():
            assert parameter.requires_grad == (parameter.grad is not None)
        fastpeft.update_and_allocate(model, 6)
        kept = [
            [layer._fastpeft.adapters["a"].ranks.kept for _, layer in fastpeft.patching.layers(each)]
            for each in (model, after)
        ]
        assert kept[0] == kept[1]
        assert_unpatching_restores(model, at)
        count("interruptions survived")


def test_a_block_that_disables_what_is_merged_leaves_it_merged_or_not():
    def act(model):
        with fastpeft.disable_adapter(model):
            model(**batch())

    for model in (merged("dora"), merged("dora")):
        places = lines_of(lambda model=model: quietly(act, model))
    allowed = [portrait(merged("dora")), portrait(having("dora"))]
    allowed = [{key: value for key, value in each.items() if not key.startswith("layer")} for each in allowed]
    for at in spread(telling(places), how_many(16, 100)):
        model = merged("dora")
        assert interrupted(lambda model=model: quietly(act, model), at)
        found = {key: value for key, value in portrait(model).items() if not key.startswith("layer")}
        assert any(unlike(found, each) == [] for each in allowed), at
        assert_unpatching_restores(model, at)
        count("interruptions survived")


# Calls.

CALLED = (*((kind,) for kind in CONFIGS), ("lora", "prefix", "prompt"))


def _step(model: nn.Module) -> None:
    with fastpeft.backend("torch"), fastpeft.use_adapter(model, list(model.peft_config)):
        model(**batch()).loss.backward()


def _generate(model: nn.Module) -> None:
    with fastpeft.use_adapter(model, list(model.peft_config)):
        model.generate(batch()["input_ids"][:, :4], max_new_tokens=3, do_sample=False)


def _disabled(model: nn.Module) -> None:
    with fastpeft.disable_adapter(model):
        model(**batch())


def assert_as_before(model: nn.Module, before: dict, expected: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    assert differences(before, snapshot(model)) == [] and left_behind() == []
    assert torch.equal(result(model, batch()), expected)


@pytest.mark.parametrize("act", [_step, _generate, _disabled], ids=["step", "generate", "disabled"])
@pytest.mark.parametrize("kinds", CALLED, ids="+".join)
def test_an_interrupted_call_leaves_nothing(kinds, act):
    model = having(*kinds)
    for _ in range(2):  # the first time some things are found that are kept for the second
        places = lines_of(lambda: act(model))
    model.zero_grad(set_to_none=True)
    before, expected = snapshot(model), result(model, batch()).detach()
    for at in spread(telling(places), how_many(4, 120)):
        assert interrupted(lambda: act(model), at)
        assert_as_before(model, before, expected)
        count("interruptions survived")


class Raised(Exception):
    pass


@pytest.mark.parametrize("error", [None, Raised], ids=["ends", "raises"])
def test_a_choice_interrupted_at_any_instruction_is_what_it_was(error):
    """What a line's interruption cannot tell: one between a call and the next step of the same line, as in `token =
    variable.set(value)`."""
    variable, seen = ContextVar("chosen", default=None), []

    def act(value):
        with contextlib.suppress(Raised), scoped(variable, value):
            seen.append(variable.get())
            if error is not None:
                raise error

    for before in (None, "a choice"):
        variable.set(before)
        for at in itertools.count(1):
            hit = interrupted_in(scoped.__wrapped__.__code__, lambda: act("another"), at)
            assert variable.get() == before, at
            if not hit:
                break
            count("interruptions survived")
        assert at > 25 and seen[-1] == "another"


def _raising(*_):
    raise Raised


def _in_forward(module: nn.Module):
    return module.register_forward_hook(_raising)


def _before_forward(module: nn.Module):
    return module.register_forward_pre_hook(_raising)


def _in_backward(module: nn.Module):
    return module.register_full_backward_hook(_raising)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("where", [_before_forward, _in_forward, _in_backward], ids=["before", "forward", "backward"])
@pytest.mark.parametrize("kinds", CALLED, ids="+".join)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_error_in_a_hook_leaves_nothing(kinds, where, checkpointing):
    if checkpointing and {"prefix", "adalora"} & set(kinds):
        checkpointing = False  # their parameters are in several segments, which reentrant checkpoints refuse
    model = having(*kinds)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    _step(model)
    model.zero_grad(set_to_none=True)
    before, expected = snapshot(model), result(model, batch()).detach()
    hook = where(model.model.layers[1].mlp)
    with pytest.raises(Raised):
        _step(model)
    hook.remove()
    model.model.layers[1].mlp._is_full_backward_hook = None  # torch keeps this of a hook that is gone
    assert_as_before(model, before, expected)
    _step(model)


def test_an_error_of_a_logits_processor_leaves_nothing():
    model = having("lora", "prefix", "prompt")
    before, expected = snapshot(model), result(model, batch()).detach()
    with fastpeft.use_adapter(model, ["a", "b", "c"]), pytest.raises(Raised):
        model.generate(batch()["input_ids"][:, :4], max_new_tokens=3, logits_processor=[_raising])
    with contextlib.suppress(Raised), fastpeft.disable_adapter(model), fastpeft.backend("torch"):
        raise Raised
    assert_as_before(model, before, expected)
