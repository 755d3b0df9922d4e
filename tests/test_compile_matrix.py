"""torch.compile(fullgraph=True) on every method: one graph, the numbers and gradients of eager, any length of text."""

import pytest
import torch
import torch._dynamo.testing

from tests.compiled import COMPILED, METHODS, WAYS, adapted, stepped, varied
from tests.models import batch
from tests.peft_pair import close
from tests.prefix_pair import task_of

ONE_GRAPH = [method for method in METHODS if method != "p-tuning-lstm"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(found, expected) -> None:
    close(found[0], expected[0], 1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        close(found[1][name], grad, 1e-5)


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.parametrize("method", ONE_GRAPH)
@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_is_one_graph(way, method, family):
    """Llama's through inductor, without its C++, once for each op, and as far as inductor's input; those of other
    families traced."""
    model, inputs = adapted(method, family, way), batch(task_of(family))
    expected = stepped(model, model, inputs)
    how = {"backend": "aot_eager" if family == "llama" else "eager"}
    if family == "llama" and method in ("lora", "prefix", "prompt", "adapter"):
        how = {"backend": "inductor", "mode": "lite"}
    compiled = torch.compile(model, fullgraph=True, **how)
    same(stepped(model, compiled, inputs), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        same(stepped(model, compiled, inputs), expected)


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "prompt", "adapter"])  # the others: as one of these
def test_lengths_and_batches_change_without_recompiling(method):
    counter = torch._dynamo.testing.CompileCounter()
    model = adapted(method)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for step in range(50):
        inputs = varied("llama", step)
        found = stepped(model, compiled, inputs)
        if step < 6 or step == 49:
            same(found, stepped(model, model, inputs))
    assert counter.frame_count == 1


def test_the_second_length_is_the_last_to_be_compiled():
    """As torch.compile does it by itself."""
    counter = torch._dynamo.testing.CompileCounter()
    model = adapted("lora")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (9, 12, 7, 15, 10, 8, 21):
        inputs = batch(length=length)
        same(stepped(model, compiled, inputs), stepped(model, model, inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_drawn_anew_in_every_call(method):
    model = adapted(method, **{METHODS[method][2]: 0.5})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch()
    losses = [float(stepped(model, compiled, inputs)[0]) for _ in range(3)]
    assert len(set(losses)) == 3
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        loss, grads = stepped(model, compiled, inputs)
        found.append((loss, {name: grad.clone() for name, grad in grads.items()}))
    same(*found)
    model.eval()
    with torch.no_grad():
        close(compiled(**inputs).loss, model(**inputs).loss, 1e-5)


def test_an_lstm_is_one_graph_where_torch_is_told_to_trace_it(monkeypatch):
    """By itself it breaks the graph around an LSTM, whoever's it is; what is computed is the same."""
    model, inputs = adapted("p-tuning-lstm", encoder_dropout=0.0), batch()
    expected = stepped(model, model, inputs)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    torch._dynamo.reset()
    same(stepped(model, torch.compile(model, backend="eager"), inputs), expected)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "allow_rnn", True)
    same(stepped(model, torch.compile(model, fullgraph=True, backend="eager"), inputs), expected)
