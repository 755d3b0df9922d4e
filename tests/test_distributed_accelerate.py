"""Every method under accelerate's DistributedDataParallel and FSDP2; torch's older FSDP; tensor parallelism, which is
refused."""

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests import distributed_accelerate as libraries
from tests import distributed_fused as fused
from tests import distributed_work as work
from tests.distributed import run
from tests.peft_pair import WEIGHTS, close

CLASSES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaFor", "fsdp2-efficient": "FSDPLlamaFor"}


@pytest.mark.slow
def test_two_processes(tmp_path):
    cases = [(method, engine) for method in work.METHODS for engine in ("ddp", "fsdp2")]
    cases += [(method, "fsdp2-efficient") for method in ("adalora", "p-tuning-lstm", "lora-head")]
    ranks = run(fused.under_libraries, 2, tmp_path, str(tmp_path), cases, timeout=120)
    for (method, engine), found in zip(cases, zip(*(each["accelerated"] for each in ranks), strict=True), strict=True):
        assert all(each["class"].startswith(CLASSES[engine]) for each in found)
        work.assert_as_alone(method, found, engine)
        assert_saved(method, tmp_path / engine / method)
    assert all(each["states"] == dict.fromkeys(libraries.STATES, True) for each in ranks)
    for method in libraries.FLAT:
        assert_flat(method, [each["flat"][method] for each in ranks])
    work.assert_as_alone("lora", [each["fused"] for each in ranks], "fused")
    assert_saved("lora", tmp_path / "fused")
    expected = torch.tensor(work.alone("lora")["losses"])
    for losses in sum((each["fused flat"] for each in ranks), []):
        close(torch.tensor(losses), expected, 1e-5)
    for said in sum((each["tensor parallel"] for each in ranks), []):
        assert "is split by tensor parallelism (tp_plan), which adapters do not follow" in said


def assert_saved(method: str, folder) -> None:
    model = work.patched(method)
    work.train(model)
    saved = load_file(folder / WEIGHTS)
    expected = fastpeft.adapter_state_dict(model)
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        close(saved[key], tensor, 1e-5)


def assert_flat(method: str, ranks: list[list]) -> None:
    for *found, said in ranks:
        assert "belongs to a FullyShardedDataParallel, which alone can gather it: get a whole state dict" in said
        if method == "adalora":
            assert "AdaLoRA needs the factors of all layers at once" in found[0]
        else:
            close(torch.tensor(found), torch.tensor(work.alone(method)["losses"]), 1e-5)
