"""Threads, forks and worker processes beside patched models: each computes what it computes alone."""

import multiprocessing
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastpeft
from tests.counting import count
from tests.interrupted import left_behind
from tests.models import batch, tiny
from tests.peft_pair import randomise, result
from tests.two_adapters import config, two

ROUNDS = 12


def at_once(*actions: Callable[[], object]) -> None:
    """Run each in a thread of its own, all begun together; the first error is raised here."""
    started, errors = threading.Barrier(len(actions)), []

    def run(action) -> None:
        started.wait()
        try:
            for _ in range(ROUNDS):
                action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert left_behind() == []
    count("threads side by side", len(actions))


def having(kind: str):
    kinds = {
        "lora": lambda: config(use_dora=True),
        "prefix": lambda: fastpeft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: fastpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(3)
    model = fastpeft.patch(tiny(), kinds[kind]())
    randomise(model)
    return model


def gradients(model, names=None) -> dict[str, torch.Tensor]:
    """The logits and the gradients of one step, of these adapters if any are named."""
    held = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    if names is None:
        output = model(**batch())
    else:
        with fastpeft.use_adapter(model, names):
            output = model(**batch())
    found = torch.autograd.grad(output.loss, [each for _, each in held], allow_unused=True)
    return {"logits": output.logits.detach(), **{name: g for (name, _), g in zip(held, found, strict=True)}}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensor is None) == (found[name] is None), name
        assert tensor is None or torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kinds", [("lora", "prefix"), ("prompt", "lora"), ("prefix", "prompt")], ids="+".join)
def test_two_models(kinds):
    models = [having(kind) for kind in kinds]
    expected = [gradients(model) for model in models]
    assert not torch.equal(expected[0]["logits"], expected[1]["logits"])
    at_once(*(lambda m=model, e=each: same(gradients(m), e) for model, each in zip(models, expected, strict=True)))


def test_two_adapters_of_one_model_forward_and_backward():
    model = two()
    model.set_adapter(["a", "b"])  # so that both want gradients
    expected = {names: gradients(model, names) for names in ("a", "b")}
    assert not torch.equal(expected["a"]["logits"], expected["b"]["logits"])
    at_once(*(lambda n=name: same(gradients(model, n), expected[n]) for name in expected))


@pytest.mark.interpreter
def test_two_backends():
    models = having("lora"), having("lora")
    inputs = {key: value[:, :3] for key, value in batch().items()}

    def run(number: int, name: str) -> torch.Tensor:
        with fastpeft.backend(name), torch.no_grad():
            return result(models[number], inputs)

    expected = [run(0, "torch"), run(1, "triton")]
    assert not torch.equal(*expected) and torch.allclose(*expected, atol=1e-4)

    def check(number: int, name: str) -> None:
        assert torch.equal(run(number, name), expected[number])

    at_once(lambda: check(0, "torch"), lambda: check(1, "triton"))


def test_generating_while_another_model_trains():
    ids = batch()["input_ids"][:, :4]
    one, other, alone = having("prefix"), having("lora"), having("lora")

    def generate() -> torch.Tensor:
        return one.generate(ids, max_new_tokens=4, do_sample=False)

    def trainer(model) -> Callable[[], None]:
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2)

        def step() -> None:
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()

        return step

    expected, step = generate(), trainer(alone)
    for _ in range(ROUNDS):
        step()
    at_once(lambda: torch.testing.assert_close(generate(), expected, rtol=0, atol=0), trainer(other))
    for x, y in zip(other.parameters(), alone.parameters(), strict=True):
        assert torch.equal(x, y)


def test_loading_while_another_model_is_called(tmp_path):
    model = having("prefix")
    fastpeft.save_adapter(having("lora"), tmp_path)
    expected, loaded = result(model, batch()).detach(), result(having("lora"), batch()).detach()

    def load() -> None:
        assert torch.equal(result(fastpeft.load_adapter(tiny(), tmp_path), batch()), loaded)

    def call() -> None:
        assert torch.equal(result(model, batch()), expected)

    at_once(load, call)


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_data_loader_with_workers_beside_a_patched_model(way):
    model = having("lora")
    expected = gradients(model)
    inputs = batch()
    rows = TensorDataset(*(inputs[key].repeat(4, 1) for key in ("input_ids", "attention_mask", "labels")))
    seen = 0
    for ids, mask, labels in DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context=way):
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        assert torch.equal(output.logits, expected["logits"])
        output.loss.backward()
        seen += 1
    assert seen == 4


def _child(model, queue, expected) -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), fastpeft.use_adapter(model, "b"):
        queue.put((left_behind() != [], torch.equal(result(model, batch()), expected)))


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_fork_of_a_patched_model_computes_the_same_and_ends_well():
    model = two()
    expected = []
    for name in ("a", "b"):
        with fastpeft.use_adapter(model, name), torch.no_grad():
            expected.append(result(model, batch()))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with fastpeft.use_adapter(model, "a"):  # which the child has, and overrides for itself
        child = context.Process(target=_child, args=(model, queue, expected[1]))
        child.start()
        with torch.no_grad():
            assert torch.equal(result(model, batch()), expected[0])
    child.join(60)
    assert child.exitcode == 0 and queue.get() == (True, True)
    assert os.getpid() != child.pid and left_behind() == []
