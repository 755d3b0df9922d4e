"""ALBERT's layers share attention modules, and have a prefix each: under checkpoints that compute again, threads, more
than one adapter and torch.compile, with groups of one layer and of several."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.attention.sites import find_sites
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, result
from tests.prefix_pair import LENGTH, prefixed, step_gradients

FAMILIES = ("albert", "albert-inner", "albert-one")
GROUP = "albert.encoder.albert_layer_groups.{}.albert_layers.{}.attention"
# Pass -> layer of each module, in their order.
PASSES = {
    "albert": {(0, 0): {0: 0, 1: 1}, (1, 0): {2: 2, 3: 3}},
    "albert-inner": {(0, 0): {0: 0, 1: 2}, (0, 1): {0: 1, 1: 3}, (1, 0): {2: 4, 3: 6}, (1, 1): {2: 5, 3: 7}},
    "albert-one": {(0, 0): {0: 0, 1: 1, 2: 2}},
}
TABLE = "prompt_encoder.default.embedding.weight"


def made(family: str, task: str = "SEQ_CLS", **settings):
    return prefixed(family, task, **settings)


def layers_of(model) -> int:
    return model.peft_config["default"].num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_has_a_pass_of_a_module(family):
    model = tiny(family, "SEQ_CLS")
    found = find_sites(model)
    expected = {GROUP.format(*place): passes for place, passes in PASSES[family].items()}
    assert {path: passes for (path, _, _), passes in zip(found.attention, found.passes, strict=True)} == expected
    assert [path for path, _, _ in found.stacks] == ["albert.encoder"]
    again = find_sites(made(family, base=model))
    assert again.passes == found.passes and [each[0] for each in again.stacks] == ["albert.encoder"]


def test_the_stack_is_not_reported():
    """It computes nothing of its own."""
    kinds = {layer.kind for layer in fastpeft.report(made("albert")).layers}
    assert kinds == {"AdaptedAlbertAttention", "SavedLinear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_of_the_table_goes_to_its_layer_alone(family):
    """The keys of the prefix that the modules are called with, in the order of the calls, are the table's in order."""
    model, seen = made(family), []
    from fastpeft.attention import interface

    original = interface.attend

    def spy(module, query, key, value, mask, prefix, *args, **kwargs):
        seen.append([t.transpose(0, 1).flatten(1) for t in prefix])
        return original(module, query, key, value, mask, prefix, *args, **kwargs)

    interface.attend = spy
    try:
        model(**batch("SEQ_CLS"))
    finally:
        interface.attend = original
    table = model.get_parameter(TABLE)
    assert len(seen) == layers_of(model) and table.shape == (LENGTH, 2 * len(seen) * 32)
    for layer, (key, value) in enumerate(seen):
        assert torch.equal(key, table[:, 64 * layer : 64 * layer + 32])
        assert torch.equal(value, table[:, 64 * layer + 32 : 64 * (layer + 1)])
    assert step_gradients(model, batch("SEQ_CLS"))[TABLE].view(LENGTH, 2 * len(seen), 32).any(2).all()


class Checkpointed(torch.nn.Module):
    """Every call of a module inside a checkpoint, which gets its tensors alone."""

    def __init__(self, inner, reentrant: bool, calls: list):
        super().__init__()
        self.inner, self.reentrant, self.calls = inner, reentrant, calls

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        def run(hidden):
            self.calls.append(kwargs.get("pass_number"))
            return self.inner(hidden, attention_mask, **kwargs)

        return checkpoint(run, hidden_states, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["direct", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_each_pass_again(family, reentrant):
    """Of every group, in transformers' own way as soon as it has one: ALBERT takes no checkpoints there yet."""
    inputs = batch("SEQ_CLS")
    expected = step_gradients(made(family), inputs)
    model, calls = made(family), []
    groups = model.albert.encoder.albert_layer_groups
    for i in range(len(groups)):
        groups[i] = Checkpointed(groups[i], reentrant, calls)
    model.albert.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    model.train()
    model(**inputs).loss.backward()
    count = model.config.num_hidden_layers
    assert calls == [*range(count), *reversed(range(count))]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name.replace(".inner.", ".")]), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["direct", "reentrant"])
def test_the_whole_stack_in_a_checkpoint(reentrant):
    model, slopes = made("albert-inner").train(), []
    states = model.albert.embeddings(batch("SEQ_CLS")["input_ids"]).detach().requires_grad_()
    for run in (
        lambda states: model.albert.encoder(states)[0],
        lambda states: checkpoint(lambda x: model.albert.encoder(x)[0], states, use_reentrant=reentrant),
    ):
        model.zero_grad()
        run(states).square().sum().backward()
        slopes.append(model.get_parameter(TABLE).grad.clone())
    assert slopes[0].view(LENGTH, 16, 32).any(2).all() and torch.equal(slopes[1], slopes[0])


def test_two_threads_with_two_prefixes_do_not_meet():
    model = made("albert-inner")
    torch.manual_seed(3)
    model.add_adapter("other", fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    inputs, expected = {"input_ids": batch()["input_ids"]}, {}
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad():
            expected[name] = result(model, inputs)
    assert not torch.allclose(expected["default"], expected["other"])
    wrong, ready = [], threading.Barrier(2)

    @torch.no_grad()
    def work(name):
        ready.wait()
        with fastpeft.use_adapter(model, name):
            for _ in range(20):
                if not torch.equal(result(model, inputs), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_prefixes_together_and_beside_lora():
    model = made("albert")
    torch.manual_seed(3)
    model.add_adapter("other", fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    model.add_adapter("lora", fastpeft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    model.set_adapter(["default", "other", "lora"])
    model(**batch("SEQ_CLS")).loss.backward()
    for name in (TABLE, TABLE.replace("default", "other")):
        slope = model.get_parameter(name).grad
        assert slope.view(len(slope), 2 * layers_of(model), 32).any(2).all()
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert "Numbered" not in type(model.albert.encoder).__name__
    model.set_adapter("lora")
    step_gradients(model, batch("SEQ_CLS"))


def test_a_compiled_model_gives_the_same():
    torch._dynamo.reset()
    model = made("albert", "TOKEN_CLS")
    inputs = {"input_ids": batch()["input_ids"]}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(**inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), model.get_parameter(TABLE).grad.clone()))
    close(results[1][0], results[0][0], 1e-6)
    close(results[1][1], results[0][1], 1e-5)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_unpatched_it_is_the_base_model(family):
    base, inputs = tiny(family, "SEQ_CLS"), batch("SEQ_CLS")
    plain = base(**inputs, output_hidden_states=True).hidden_states
    before, expected = snapshot(base), result(base, inputs)
    model = made(family, base=base)
    assert not torch.allclose(result(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(result(model, inputs), expected)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == len(plain) and not torch.equal(hidden[0], plain[0])
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(result(model, inputs), expected)


def test_a_call_that_does_not_say_its_pass_is_refused():
    model = made("albert")
    states = torch.zeros(1, 3, 32)
    with pytest.raises(fastpeft.PatchError, match="an attention module that is 2 layers was called without saying"):
        model.albert.encoder.albert_layer_groups[0](states)
    model.albert.encoder(torch.zeros(1, 3, 16))


def test_a_stack_that_numbers_passes_is_no_target():
    model = made("albert")
    with pytest.raises(fastpeft.TargetError, match="AlbertTransformer"):
        model.add_adapter("lora", fastpeft.LoraConfig(target_modules=["encoder"]))
