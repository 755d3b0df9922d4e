"""A small adapter on disk, and what tests of adapter directories compare."""

import contextlib
import os
import shutil

import pytest
import torch

from fastpeft import durable, journal
from fastpeft.errors import AdapterFileError
from fastpeft.files import read_adapter, write_adapter
from tests.failing_disk import Crash, PowerLossOs

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "fastpeft.json"
SETTINGS = {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"]}


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "base_model.model.q.lora_A.weight": torch.randn(2, 8, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(8, 2, generator=generator).to(torch.bfloat16),
    }


def tree(directory):
    """Everything about the files of a directory that a reader could change."""
    found = {}
    for folder, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


ADAPTERS = {
    "A": (some_tensors(1), SETTINGS | {"r": 2, "lora_alpha": 1}, {"from": "A"}),
    "B": (some_tensors(2), SETTINGS | {"r": 2, "lora_alpha": 2}, {"from": "B"}),
    "plain": (some_tensors(3), SETTINGS | {"lora_alpha": 3}, None),
    "same-config": (some_tensors(4), SETTINGS | {"lora_alpha": 1}, None),
    "same": (some_tensors(1), SETTINGS | {"r": 2, "lora_alpha": 1}, {"from": "A"}),
}


def save(directory, name):
    write_adapter(directory, *ADAPTERS[name])


def which(found, names):
    """The one of `names` that was read; a mixture is none."""
    for name in names:
        tensors, config, side = ADAPTERS[name]
        same = found.tensors.keys() == tensors.keys() and all(
            torch.equal(found.tensors[key], tensor) for key, tensor in tensors.items()
        )
        if same and found.config == config and found.side == side:
            return name
    raise AssertionError(f"a mixture: {found}")


def read(directory, *names):
    """Which adapter is in the directory; None if there is none at all."""
    try:
        return which(read_adapter(directory), names)
    except AdapterFileError as error:
        if "does not exist" in str(error) or "it holds []" in str(error):
            return None
        raise


def own_files(directory):
    """Our journals and temporaries in the directory."""
    return sorted(name for name in os.listdir(directory) if name.startswith(".fastpeft-"))


@contextlib.contextmanager
def disk(os_like):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "os", os_like)
        patch.setattr(journal, "os", os_like)
        yield os_like


def assert_next_save_is_whole(directory):
    save(directory, "B")
    assert own_files(directory) == []
    assert read(directory, "B") == "B"


def survivors(directory, target, new):
    """For every crash step and every state that the loss of power may leave then: what is read there."""
    for at in range(100):
        shutil.rmtree(target / "live", ignore_errors=True)
        shutil.copytree(directory, target / "live")
        with disk(PowerLossOs(target / "live", at)) as failing, contextlib.suppress(Crash):
            save(target / "live", new)
        for state in failing.survivors():
            left = target / "left"
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for name, content in state.items():
                (left / name).write_bytes(content)
            yield failing.fired, left
        if not failing.fired:
            break
