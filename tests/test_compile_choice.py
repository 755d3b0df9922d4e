"""Compiled calls inside blocks that choose their adapters: a graph for each choice, in the thread and task of its
block alone."""

import asyncio
import copy
import threading

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from tests.models import batch
from tests.peft_pair import close, randomise
from tests.two_adapters import outputs, two

CHOICES = (("a",), ("b",), ("a", "b"), ())
X = torch.linspace(-1, 1, 24).view(3, 8)


def choosing(model, names):
    return fastpeft.use_adapter(model, list(names)) if names else fastpeft.disable_adapter(model)


def small() -> torch.nn.Module:
    """Two layers, and the adapters a (active) and b."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    fastpeft.patch(model, fastpeft.LoraConfig(r=2, target_modules=["0", "2"]), adapter_name="a")
    model.add_adapter("b", fastpeft.LoraConfig(r=3, target_modules=["0"]))
    for name in ("b", "a"):
        model.set_adapter(name)
        randomise(model, seed=ord(name))
    return model


def values(model) -> dict:
    found = {}
    for names in CHOICES:
        with choosing(model, names), torch.no_grad():
            found[names] = model(X)
    assert all(not torch.allclose(found[x], found[y]) for x in found for y in found if x != y)
    return found


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


@torch.no_grad()
def test_every_choice_is_one_graph_and_is_compiled_once(counter):
    model = small()
    expected = values(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    close(compiled(X), expected[("a",)], 1e-6)
    for _ in range(3):
        for names in CHOICES:
            with choosing(model, names):
                close(compiled(X), expected[names], 1e-6)
                with fastpeft.use_adapter(model, "b"):
                    close(compiled(X), expected[("b",)], 1e-6)
        close(compiled(X), expected[("a",)], 1e-6)
    assert counter.frame_count == 1 + len(CHOICES)
    model.set_adapter("b")
    close(compiled(X), expected[("b",)], 1e-6)
    with choosing(model, ("a",)):
        close(compiled(X), expected[("a",)], 1e-6)


def test_a_reference_pass_without_adapters_between_steps(counter):
    """As preference training does it: the reference's logits are those of the base model, in every step."""
    expected = outputs(layers=1)[()]
    model, eager = two(layers=1).train(), two(layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for each, run in ((model, compiled), (eager, eager)):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            with torch.no_grad(), each.disable_adapter():
                close(run(**batch()).logits, expected, 1e-6)
            loss = run(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert counter.frame_count == 2
    before, theirs = dict(two(layers=1).named_parameters()), dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter, theirs[name], 1e-5)
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name


def test_threads_with_choices_of_their_own(counter):
    model = small()
    expected = values(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    wrong, started = [], threading.Barrier(len(CHOICES) + 1)

    def call(names, block) -> None:
        started.wait()
        for _ in range(200):
            with block(), torch.no_grad():
                if not torch.allclose(compiled(X), expected[names], atol=1e-5):
                    wrong.append(names)

    threads = [
        threading.Thread(target=call, args=(names, lambda names=names: choosing(model, names))) for names in CHOICES
    ]
    threads.append(threading.Thread(target=call, args=(("a",), torch.no_grad)))  # which opens no block
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_tasks_with_choices_of_their_own(counter):
    """Those of one thread, whose blocks overlap, and the threads to which a task sends a call."""
    model = small()
    expected = values(model)
    compiled = torch.no_grad()(torch.compile(model, fullgraph=True, backend=counter))

    async def call(names, elsewhere):
        found = []
        with choosing(model, names):
            for _ in range(5):
                await asyncio.sleep(0)
                found.append(await asyncio.to_thread(compiled, X) if elsewhere else compiled(X))
        return names, found

    async def together(elsewhere):
        return await asyncio.gather(*(call(names, elsewhere) for names in CHOICES))

    for elsewhere in (False, True):
        for names, found in asyncio.run(together(elsewhere)):
            assert len(found) == 5
            for each in found:
                close(each, expected[names], 1e-6)


@torch.no_grad()
def test_a_block_is_of_one_model(counter):
    model = small()
    expected, other = values(model), copy.deepcopy(model)
    compiled, theirs = (torch.compile(each, fullgraph=True, backend=counter) for each in (model, other))
    with fastpeft.use_adapter(model, "b"):
        close(theirs(X), expected[("a",)], 1e-6)
        with fastpeft.disable_adapter(other):
            close(compiled(X), expected[("b",)], 1e-6)
            close(theirs(X), expected[()], 1e-6)


@torch.no_grad()
def test_a_block_inside_what_is_compiled_breaks_the_graph_and_is_heard():
    torch._dynamo.reset()
    model = small()
    expected = values(model)

    def both(x):
        with fastpeft.use_adapter(model, "b"):
            one = model(x)
        return one, model(x)

    one, two = torch.compile(both, backend="eager")(X)
    close(one, expected[("b",)], 1e-6)
    close(two, expected[("a",)], 1e-6)
    torch._dynamo.reset()


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_model_that_was_compiled_in_place_before_the_patch_is_compiled_again(counter):
    torch.manual_seed(3)
    model = Layers()
    model.compile(backend=counter, fullgraph=True)
    plain = model(X)
    fastpeft.patch(model, fastpeft.LoraConfig(r=2, target_modules=["first", "second"]))
    randomise(model)
    found = model(X)
    assert counter.frame_count == 2 and not torch.allclose(found, plain)
    model._compiled_call_impl = None
    close(found, model(X), 1e-6)
