"""Every method in models whose weights accelerate keeps elsewhere between calls, dispatched before the patch and after
it. LoRA's own cases are in test_layer_hooks.py."""

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model

import fastpeft
from tests import distributed_work as work
from tests.models import tiny
from tests.peft_pair import close, randomise, result

OFFLOADS = ("cpu", "disk", "dispatch")
REFUSED_BEFORE = {  # which need a weight that is not there
    ("rslora-dora", "cpu"): "offloaded by accelerate, and use_dora=True needs its weight",
    ("rslora-dora", "disk"): "offloaded by accelerate, and use_dora=True needs its weight",
    ("rslora-dora", "dispatch"): "offloaded by accelerate, and use_dora=True needs its weight",
    **{(method, how): "score.weight is on the meta device or offloaded" for how in ("cpu", "disk")
       for method in ("lora-head", "prefix-head", "adapter-head")},
}  # fmt: skip


def device_map(model) -> dict[str, str]:
    """The second layer on disk, the rest where it computes."""
    outer = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    inner = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    return {**outer, **inner, "model.layers.0": "cpu", "model.layers.1": "disk"}


def offloaded(model, how: str, folder):
    if how == "cpu":
        return cpu_offload(model, "cpu")
    if how == "disk":
        return disk_offload(model, folder, "cpu")
    return dispatch_model(model, device_map(model), main_device="cpu", offload_dir=folder, force_hooks=True)


def inputs_of(task: str, labels: bool = True) -> dict[str, torch.Tensor]:
    inputs = {key: value[:2] for key, value in work.batches(task)[0].items()}
    return inputs if labels else {key: value for key, value in inputs.items() if key != "labels"}


def gradients(model) -> dict[str, torch.Tensor]:
    model(**inputs_of(str(model.peft_config["default"].task_type.value))).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", work.METHODS)
def test_a_patched_model_can_be_offloaded(method, tmp_path):
    inputs = inputs_of(work.METHODS[method][0], labels=False)
    with torch.no_grad():
        expected = result(work.patched(method).eval(), inputs)
        for how in OFFLOADS:
            model = offloaded(work.patched(method).eval(), how, tmp_path / how)
            assert any(parameter.is_meta for parameter in model.parameters())
            for _ in range(2):
                close(result(model, inputs), expected, 1e-6)


@pytest.mark.parametrize("method", work.METHODS)
def test_an_offloaded_model_can_be_patched_and_trained(method, tmp_path):
    task, kind, settings = work.METHODS[method]
    reference = work.patched(method).eval()
    inputs, expected = inputs_of(task, labels=False), gradients(reference)
    for how in OFFLOADS:
        base = offloaded(tiny(task=task), how, tmp_path / how)
        torch.manual_seed(3)
        if (method, how) in REFUSED_BEFORE:
            with pytest.raises(fastpeft.TargetError, match=REFUSED_BEFORE[method, how]):
                fastpeft.patch(base, kind(task_type=task, **settings))
            continue
        model = fastpeft.patch(base, kind(task_type=task, **settings))
        randomise(model)
        close(result(model, inputs), result(reference, inputs), 1e-6)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient, 1e-6)
        if method == "embedding" and how != "dispatch":
            with pytest.raises(
                fastpeft.AdapterFileError, match="embed_tokens.base_layer.weight' is on the meta device"
            ):
                fastpeft.save_adapter(model, tmp_path / "saved")
            continue
        fastpeft.save_adapter(model, tmp_path / "saved")
        loaded = fastpeft.load_adapter(tiny(task=task), tmp_path / "saved")
        close(result(loaded, inputs), result(reference, inputs), 1e-6)


MAPS = {"a map": lambda: {"device_map": device_map(tiny())}, "auto": lambda: {"device_map": "auto", "max_memory": ROOM}}
ROOM = {"cpu": 60_000}  # bytes: for the embeddings, the rest goes to disk


@pytest.mark.parametrize("which", MAPS)
def test_a_device_map_of_from_pretrained(which, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    for method in ("lora", "prefix", "adapter"):
        task, kind, settings = work.METHODS[method]

        def base(method=method):
            return transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", offload_folder=tmp_path / method, **MAPS[which]()
            )

        expected = result(work.patched(method).eval(), inputs_of(task, labels=False))
        model = base()
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        torch.manual_seed(3)
        fastpeft.patch(model, kind(task_type=task, **settings))
        randomise(model)
        close(result(model, inputs_of(task, labels=False)), expected, 1e-6)
        fastpeft.unpatch(model)
        close(result(model, inputs_of(task, labels=False)), result(tiny(), inputs_of(task, labels=False)), 1e-6)
