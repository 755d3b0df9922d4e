"""PeftModels with our arithmetic under DistributedDataParallel and FSDP2: two processes train what one does."""

import functools

import pytest
import torch
from safetensors.torch import load_file

from tests import distributed_peft as work
from tests.distributed import run
from tests.peft_pair import WEIGHTS, close

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")


@functools.cache
def alone(method):
    return work.train(work.patched(method), method)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(results of both processes, the folder with the adapters)"""
    folder = tmp_path_factory.mktemp("distributed")
    return run(work.everything, 2, folder, str(folder), timeout=120), folder


@pytest.mark.xdist_group("distributed peft")
def test_two_processes_train_what_one_does(found):
    ranks, _ = found
    assert len(ranks[0]) == 2 * len(work.METHODS) - 1 + 2
    for case in ranks[0]:
        method = case.partition(" ")[2]
        expected = alone(method)
        for each in ranks:
            mine = each[case]
            close(torch.tensor(mine["losses"]), torch.tensor(expected["losses"]), 1e-5)
            assert mine["ranks"] == expected["ranks"]
            assert mine["parameters"].keys() == expected["parameters"].keys()
            for name, parameter in expected["parameters"].items():
                scale = float(parameter.abs().max())
                assert float((mine["parameters"][name] - parameter).abs().max()) <= 1e-5 * scale, (case, name)


@pytest.mark.xdist_group("distributed peft")
def test_a_sharded_peft_model_is_saved_by_peft(found):
    _, folder = found
    for method in ("lora", "adapter", "lora-head"):
        saved = load_file(folder / method / WEIGHTS)
        model = work.patched(method)
        work.train(model, method)
        expected = peft.get_peft_model_state_dict(model)
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            close(saved[name], tensor, 1e-5)
