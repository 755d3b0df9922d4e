"""Parameters of which a process has a part, without other processes: what is refused, and what a state dict gives."""

import enum

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import fastpeft
from fastpeft import distributed
from tests import distributed_work as work
from tests.distributed_fused import counted
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, result


class Status(enum.Enum):
    NOT_AVAILABLE = 2


def partition(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Leave of each parameter what DeepSpeed ZeRO-3 leaves of it; returns the whole state dict."""
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_status = number, Status.NOT_AVAILABLE
        parameter.data = torch.empty(0)
    return whole


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "prompt", "adapter"])
def test_a_model_that_was_loaded_in_parts_is_refused(method):
    task, kind, settings = work.METHODS[method]
    model = tiny()
    partition(model)
    before = snapshot(model)
    with pytest.raises(
        fastpeft.PatchError, match="partitioned by DeepSpeed ZeRO-3 .* before there is one.*: an adapter"
    ):
        fastpeft.patch(model, kind(task_type=task, **settings))
    assert differences(before, snapshot(model)) == []


def test_a_model_that_is_in_parts_is_fused_and_gets_no_room():
    """Whose layers an engine's hooks make whole, each for its own call."""
    model = work.patched("lora")
    whole = partition(model)

    def gather(module, args):
        for parameter in module.parameters(recurse=hasattr(module, "lora_A")):
            parameter.data = whole[names[parameter]]

    def release(module, args, output):
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
    with pytest.raises(
        fastpeft.PatchError, match="q_proj: its weight is partitioned by DeepSpeed ZeRO-3, and is whole"
    ):
        fastpeft.rehome(model)
    with torch.no_grad(), counted() as made:
        expected = model(**batch()).logits
        fastpeft.fuse(model)
        for _ in range(2):
            assert torch.equal(model(**batch()).logits, expected)
    assert not made and torch.equal(work.patched("lora")(**batch()).logits, expected)


def with_a_call(module, args):
    raise AssertionError("an engine's hook was called for parameters that it does not know")


@pytest.mark.parametrize("method", ["lora-head", "prefix-projection", "p-tuning-lstm", "adapter"])
def test_a_whole_state_dict_is_saved_from(method, tmp_path):
    model = work.patched(method)
    expected = {key: tensor.clone() for key, tensor in fastpeft.adapter_state_dict(model).items()}
    whole = partition(model)
    hooks = [module.register_forward_pre_hook(with_a_call) for module in model.modules() if module._parameters]
    with pytest.raises(fastpeft.PatchError, match="is partitioned by DeepSpeed ZeRO-3, which alone can gather it"):
        fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(fastpeft.PatchError, match="state_dict: .* is not in it; give the whole state dict"):
        fastpeft.save_adapter(model, tmp_path, state_dict={})
    before = snapshot(model)
    fastpeft.save_adapter(model, tmp_path, state_dict=whole)
    changed = differences(before, snapshot(model))  # an LSTM looks its weights up anew in each call
    assert [each for each in changed if "_flat_weight" not in each] == [] and len(hooks) > 10
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


def test_names_of_what_wraps_parts_are_not_in_files(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = work.patched("lora").eval()
    expected, keys = result(model, batch()), fastpeft.adapter_state_dict(model).keys()
    layers = {type(layer) for layer in model.model.layers}
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) in layers)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert fastpeft.adapter_state_dict(model).keys() == keys
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(result(fastpeft.load_adapter(tiny(), tmp_path), batch()), expected)


@pytest.mark.parametrize("kind", CheckpointImpl, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("called_before", [False, True], ids=["new", "called before"])
def test_projections_that_are_checkpointed_by_themselves_are_called(kind, called_before):
    """The others of their run go together."""
    found = {}
    for names in ((), ("projections",), ("mlp",)):
        model = work.patched("lora")
        if names:
            fastpeft.fuse(model, *names)
            with torch.set_grad_enabled(called_before):
                model(**batch())
        for layer in model.model.layers:
            for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "up_proj")):
                setattr(parent, name, checkpoint_wrapper(getattr(parent, name), checkpoint_impl=kind))
        with counted() as made:
            loss = model(**batch()).loss
            loss.backward()
        assert made == ({2: 2} if names == ("projections",) else {}), (names, made)
        found[names] = {"loss": loss.detach()}
        found[names] |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for names in (("projections",), ("mlp",)):
        assert found[names].keys() == found[()].keys() and len(found[()]) > 10
        for name, expected in found[()].items():
            close(found[names][name], expected, 1e-5)


def test_plain_tensors_are_left_alone():
    tensor = torch.randn(3, requires_grad=True)
    assert distributed.whole(tensor) is tensor and distributed.local(tensor) is tensor
    assert not distributed.is_sharded(tensor)
    module = torch.nn.Linear(2, 2)
    distributed.give_class(module, torch.nn.Linear)
    assert type(module) is torch.nn.Linear and not distributed.sharded_by_itself(module)
