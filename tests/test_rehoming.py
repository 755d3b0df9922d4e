"""`rehome`: weights are where their adapters' matrices have room beside them, and everything else is as it was."""

import copy
import gc
import io

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import fastpeft
from fastpeft import PatchError, dispatch
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.ops import _rooms
from tests.fused import adapted, called
from tests.models import batch, tiny
from tests.peft_pair import quietly

WAYS = pytest.mark.parametrize("way", ["native", "peft"])
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the adapted layers."""
    return {name: module.weight for name, module in model.named_modules() if hasattr(module, "lora_A")}


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def with_rooms(model: nn.Module) -> set[str]:
    return {name for name, weight in weights(model).items() if _rooms.room_of(weight) is not None}


@WAYS
def test_values_parameters_and_results_are_as_before_and_the_way_back(way):
    model = adapted(way)
    parameters, values, logits = dict(model.named_parameters()), values_of(model), called(model)
    assert fastpeft.rehome(model) is model
    assert with_rooms(model) == set(weights(model)) and len(with_rooms(model)) == 2 * len(PROJECTIONS)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert same(values_of(model), values)
    torch.testing.assert_close(called(model), logits)
    assert fastpeft.unrehome(model) is model and not with_rooms(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert same(values_of(model), values) and torch.equal(called(model), logits)


@pytest.mark.interpreter
@WAYS
def test_a_step_on_the_kernels_is_as_without(way):
    model = adapted(way).train()
    losses, grads = [], []
    for _ in range(2):
        model.zero_grad()
        with backend("triton"), override_plan(Plan("augment", "augment", "test")):
            loss = model(**batch()).loss
            loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        fastpeft.rehome(model)
    torch.testing.assert_close(losses[1], losses[0])
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


@WAYS
def test_twice_is_once_and_a_larger_rank_gets_more_room(way):
    model = fastpeft.rehome(adapted(way))
    addresses = {name: weight.data_ptr() for name, weight in weights(model).items()}
    fastpeft.rehome(model)
    assert addresses == {name: weight.data_ptr() for name, weight in weights(model).items()}
    if way == "native":
        quietly(model.add_adapter, "large", fastpeft.LoraConfig(target_modules=["q_proj"], r=80))
        fastpeft.rehome(model)
        moved = {name for name, weight in weights(model).items() if weight.data_ptr() != addresses[name]}
        assert {name.rpartition(".")[2] for name in moved} == {"q_proj"}


def test_a_copy_and_a_model_that_is_moved_have_none():
    model = fastpeft.rehome(adapted())
    logits, twin = called(model), copy.deepcopy(model)
    assert not with_rooms(twin) and torch.equal(called(twin), called(fastpeft.unrehome(copy.deepcopy(model))))
    assert with_rooms(model)
    before = len(_rooms._rooms)
    model.double()
    gc.collect()
    assert not with_rooms(model) and len(_rooms._rooms) == before - 2 * len(PROJECTIONS), "the old storages are free"
    torch.testing.assert_close(called(model).float(), logits)


@WAYS
def test_unpatch_ends_it(way):
    model = fastpeft.rehome(adapted(way))
    parameters = weights(model).values()
    quietly(fastpeft.unpatch, model)
    assert all(_rooms.room_of(parameter) is None and parameter.is_contiguous() for parameter in parameters)


def test_merging_and_back():
    model = adapted()
    merged = copy.deepcopy(model)
    fastpeft.rehome(model)
    for each in (model, merged):
        each.merge_adapter()
    assert with_rooms(model) and same(values_of(model), values_of(merged))
    for each in (model, merged):
        each.unmerge_adapter()
    assert same(values_of(model), values_of(merged))


def test_files(tmp_path):
    """torch's, and what transformers writes of the base, whose tensors must be contiguous there."""
    model = adapted()
    expected = values_of(model)
    fastpeft.rehome(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    model.load_state_dict(loaded)
    assert same(values_of(model), expected) and with_rooms(model)
    with pytest.raises(RuntimeError, match="None is covering the entire storage"):
        safetensors.torch.save_model(model, str(tmp_path / "model"))
    safetensors.torch.save_model(fastpeft.unrehome(model), str(tmp_path / "model"))
    base = quietly(fastpeft.unpatch, fastpeft.rehome(adapted()))
    for parameter in base.model.layers[0].self_attn.q_proj.parameters():
        parameter.data = _rooms.with_room(parameter, 16)  # as if it had not ended
    quietly(base.save_pretrained, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(values_of(again), values_of(tiny("llama")))


def test_together_with_fusions():
    model, alone = adapted(), adapted()
    called(fastpeft.fuse(fastpeft.rehome(model)))
    torch.testing.assert_close(called(model), called(alone))
    fastpeft.unfuse(model)
    assert with_rooms(model), "unfuse is not its way back"


def test_only_adapters_in_the_base_s_dtype():
    model = adapted().to(torch.bfloat16)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not name.endswith("q_proj"):
            module.lora_A.float()
            module.lora_B.float()
    fastpeft.rehome(model)
    assert {name.rpartition(".")[2] for name in with_rooms(model)} == {"q_proj"}


def test_what_cannot_be_rehomed_is_refused_with_a_reason():
    with pytest.raises(PatchError):
        fastpeft.rehome(tiny("llama"))
    with pytest.raises(PatchError):
        fastpeft.unrehome(tiny("llama"))
    model = adapted()
    model.requires_grad_(True)
    with pytest.raises(PatchError, match="no weight of this Llama.* can have room; of q_proj: its weight is tr"):
        fastpeft.rehome(model)
    convolutions = adapted(family="gpt2", target_modules=["c_attn"])
    with pytest.raises(PatchError, match="of c_attn: it is no linear layer"):
        fastpeft.rehome(convolutions)


def test_memory_that_gives_out_leaves_nothing_changed(monkeypatch):
    model, calls = adapted(), []
    values = values_of(model)
    shipped = fastpeft.rehoming.give_room

    def give_room(layer):
        calls.append(layer)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("made up")
        shipped(layer)

    monkeypatch.setattr(fastpeft.rehoming, "give_room", give_room)
    with pytest.raises(torch.OutOfMemoryError):
        fastpeft.rehome(model)
    assert not with_rooms(model) and same(values_of(model), values)


def test_the_rules_on_a_gpu_are_not_changed_by_it():
    for rows in (1, 64, 8192):
        plan = dispatch.predicted_lora_plan(torch.device("cuda"), rows)
        assert "augment" not in (plan.forward, plan.backward)
