"""Every method under FSDP2 (`fully_shard`): training, files, resuming, dtypes, and what is refused in words."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests import distributed_fsdp as fsdp
from tests import distributed_fused as fused
from tests import distributed_work as work
from tests.distributed import run
from tests.models import tiny
from tests.peft_pair import WEIGHTS, close

CASES = [
    *((method, {}) for method in work.METHODS),
    *((method, {"micro": 2}) for method in ("lora", "adalora", "prefix", "prompt", "adapter", "lora-head")),
    *((method, {"checkpointing": "reentrant"}) for method in ("lora", "adalora", "prefix", "p-tuning", "adapter")),
    *((method, {"checkpointing": "not reentrant"}) for method in ("lora", "adalora", "prefix-projection", "adapter")),
    # The root's parameters too, virtual tokens among them, are given back after the forward pass.
    *((method, {"reshard_after_forward": True}) for method in ("prefix", "p-tuning-lstm", "lora-head")),
    ("prefix", {"reshard_after_forward": True, "checkpointing": "not reentrant"}),
    ("adalora", {"reshard_after_forward": False}),
]
INTERRUPTED = ["lora-head", "adalora", "prefix-projection", "p-tuning-lstm", "adapter"]


@pytest.mark.slow
def test_two_processes(tmp_path):
    methods = list(work.METHODS)
    ranks = run(fused.under_fsdp2, 2, tmp_path, str(tmp_path), CASES, methods, INTERRUPTED, timeout=120)
    for (method, case), found in zip(CASES, zip(*(each["trained"] for each in ranks), strict=True), strict=True):
        work.assert_as_alone(method, found, case)
    for case, found in zip(fused.FSDP, zip(*(each["fused"] for each in ranks), strict=True), strict=True):
        work.assert_as_alone("lora", found, case)
    for method, found in zip(INTERRUPTED, zip(*(each["resumed"] for each in ranks), strict=True), strict=True):
        work.assert_as_alone(method, found, "resumed")
    for method, found in zip(methods, zip(*(each["saved"] for each in ranks), strict=True), strict=True):
        assert_saved(method, found, tmp_path)
    for each in ranks:
        assert each["state dicts"] == []
        assert_in_words(each["refused"])
        for method, losses in each["half"].items():
            close(torch.tensor(losses), torch.tensor(work.alone(method)["losses"]), 2e-2)
        for method, losses in each["half base"].items():
            close(torch.tensor(losses), torch.tensor(alone_on_half_base(method)), 2e-2)


def assert_saved(method: str, found, folder) -> None:
    model = work.patched(method)
    work.train(model, steps=fsdp.HALF)
    expected = fastpeft.adapter_state_dict(model)
    for tensors in found:
        assert tensors.keys() == expected.keys()
    written, again = (folder / where / method for where in ("gathered", "from state dict"))
    saved = load_file(written / WEIGHTS)
    for key, tensor in expected.items():
        close(saved[key], tensor, 1e-5)
        assert all(torch.equal(tensors[key], saved[key]) for tensors in found)
    assert (again / WEIGHTS).read_bytes() == (written / WEIGHTS).read_bytes()
    assert (again / "adapter_config.json").read_bytes() == (written / "adapter_config.json").read_bytes()
    fastpeft.save_adapter(model, folder / "alone" / method)
    names = [{file.name for file in where.iterdir()} for where in (written, folder / "alone" / method)]
    assert names[0] == names[1]
    configs = [
        json.loads((where / "adapter_config.json").read_text()) for where in (written, folder / "alone" / method)
    ]
    assert configs[0] == configs[1]
    fastpeft.load_adapter(tiny(task=work.METHODS[method][0]), written)


def alone_on_half_base(method: str) -> list[float]:
    model = fsdp.both() if method == "both" else work.patched(method, torch.bfloat16)
    return work.train(model)


def assert_in_words(refused: dict[str, str]) -> None:
    expected = {
        "order": "embed_tokens.weight is a DTensor: an adapter goes into whole parameters: load the model, then",
        "merge": "its weight is sharded; save the adapter, and merge it into a model that is not",
        "save": "a file, not a directory|the adapter is not saved: rank 0, which writes it, says why",
        "lacking": "state_dict: .*lora_A.default.weight is not in it; give the whole state dict",
        "part": "is sharded by itself, .*: call fully_shard on whole decoder layers and on the model",
        "dtypes": "is torch.float32, .* is torch.bfloat16, and fully_shard\\(model.layers.0\\) has both in one group, "
        ".*Before fully_shard convert what is trained to fp32, and give it mp_policy=",
        "head": "score.* is torch.bfloat16, .* is torch.float32, and fully_shard\\(model\\) has both in one group, .*"
        "or shard a trained head by itself",
    }
    for what, said in refused.items():
        with pytest.raises(AssertionError, match=expected[what.split()[0]]):
            raise AssertionError(said)


def test_four_processes_in_two_replicas(tmp_path):
    methods = ["lora-head", "adalora", "prefix-projection"]
    ranks = run(fsdp.hybrid, 4, tmp_path, methods, str(tmp_path))
    for method, found in zip(methods, zip(*ranks, strict=True), strict=True):
        work.assert_as_alone(method, found, "hybrid")
        model = fastpeft.load_adapter(tiny(task=work.METHODS[method][0]), tmp_path / method)
        for key, tensor in fastpeft.adapter_state_dict(model).items():
            assert tensor.isfinite().all() and tensor.any(), key
