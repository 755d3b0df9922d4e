"""Adapter directories: the bytes are peft's, and what is saved is what can be read."""

import json
import os

import pytest
import torch
from torch import nn

from fastpeft import files
from fastpeft.errors import AdapterFileError
from fastpeft.files import adapter_directory, read_adapter, read_config, write_adapter
from fastpeft.safetensors_header import TensorInfo, read_header
from tests.adapter_dirs import CONFIG, SETTINGS, SIDE, WEIGHTS, assert_same_tensors, some_tensors, tree


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter"
    write_adapter(path, some_tensors(), SETTINGS)
    return path


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.v(self.q(x)))


def peft_model(seed=0, awkward=False, dtype=torch.float32, name="default"):
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], modules_to_save=["head"])
    model = peft.get_peft_model(Two(), config, adapter_name=name)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(dtype)
    if awkward:
        q, v = model.base_model.model.q, model.base_model.model.v
        q.lora_A[name].weight = nn.Parameter(torch.randn(8, 2).T)  # not contiguous
        v.lora_B[name].weight = q.lora_B[name].weight  # aliased
        storage = torch.randn(4, 8)
        v.lora_A[name].weight = nn.Parameter(storage[1:3])  # part of a larger storage
    return model


@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_both_files_have_the_bytes_that_peft_writes(tmp_path, dtype, awkward):
    from peft import get_peft_model_state_dict

    model = peft_model(awkward=awkward, dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / CONFIG).read_bytes())
    tensors = get_peft_model_state_dict(model)
    assert not awkward or not all(tensor.is_contiguous() for tensor in tensors.values())

    write_adapter(tmp_path / "ours", dict(reversed(tensors.items())), config)

    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "ours")) == [CONFIG, WEIGHTS]


def test_peft_loads_what_we_write_and_we_read_what_peft_writes(tmp_path):
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    model = peft_model(seed=1)
    model.save_pretrained(tmp_path / "theirs")
    found = read_adapter(tmp_path / "theirs")
    assert_same_tensors(found.tensors, get_peft_model_state_dict(model))
    assert found.side is None
    assert found.config["r"] == 2

    write_adapter(tmp_path / "ours", found.tensors, found.config, side={"schema": 1})
    base = Two()
    base.load_state_dict(model.get_base_model().state_dict() | plain_weights(model), strict=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours")
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), base_output(model, x))  # the adapter does something
    assert PeftConfig.from_pretrained(tmp_path / "ours").to_dict() == PeftConfig.from_pretrained(
        tmp_path / "theirs"
    ).to_dict() | {"base_model_name_or_path": None}


def plain_weights(model):
    wrapped = model.base_model.model
    return {
        "q.weight": wrapped.q.base_layer.weight,
        "q.bias": wrapped.q.base_layer.bias,
        "v.weight": wrapped.v.base_layer.weight,
        "v.bias": wrapped.v.base_layer.bias,
    }


def base_output(model, x):
    with model.disable_adapter():
        return model(x)


def test_side_data_is_read_back_and_a_save_without_it_removes_it(adapter):
    side = {"schema": 1, "hf_quirks": False, "what": ["ü", 1.5]}
    write_adapter(adapter, some_tensors(), SETTINGS, side)
    assert read_adapter(adapter).side == side
    write_adapter(adapter, some_tensors(1), SETTINGS)
    assert read_adapter(adapter).side is None
    assert sorted(os.listdir(adapter)) == [CONFIG, WEIGHTS]


def test_side_data_does_not_outlive_its_weights(tmp_path):
    """peft, saving over an adapter of ours, leaves our third file where it is."""
    write_adapter(tmp_path, some_tensors(), SETTINGS, {"hf_quirks": False})
    peft_model().save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"fastpeft\.json is ignored, .* replaced adapter_model\.safetensors"
    ) as caught:
        found = read_adapter(tmp_path)
    assert found.side is None
    assert caught[0].filename == __file__


def test_header_and_validate_come_before_the_data(tmp_path, adapter):
    expected = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in some_tensors().items()}
    assert read_header(adapter / WEIGHTS) == expected
    seen = []
    found = read_adapter(adapter, validate=lambda *given: seen.append(given))
    assert seen == [(SETTINGS, expected, None)]
    assert (found.config, found.header, found.path) == (SETTINGS, expected, str(adapter))
    assert_same_tensors(found.tensors, some_tensors())


def test_what_validate_raises_reaches_the_caller(adapter):
    def fail(config, header, side):
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        read_adapter(adapter, validate=fail)


def test_tensors_do_not_depend_on_the_file(adapter):
    """Mapped memory would kill the process with SIGBUS here."""
    found = read_adapter(adapter)
    os.truncate(adapter / WEIGHTS, 0)
    assert_same_tensors(found.tensors, some_tensors())
    found.tensors["base_model.model.q.lora_A.weight"].zero_()  # writable, too


def test_relative_paths_and_links_to_the_directory(adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    os.symlink("adapter", "link")
    for path in ("adapter", "adapter/", "link", "./link/../adapter"):
        assert_same_tensors(read_adapter(path).tensors, some_tensors())


UNSAVABLE = {
    "no-tensors": ({}, "0 tensors"),
    "zero-numel": ({"a": torch.zeros(0, 4)}, "'a' holds no values", "ZeRO-3"),
    "meta": ({"a": torch.zeros(2, device="meta")}, "'a' is on the meta device"),
    "int64": ({"a": torch.zeros(2, dtype=torch.int64)}, "'a' has dtype torch.int64"),
    "bool": ({"a": torch.zeros(2, dtype=torch.bool)}, "'a' has dtype torch.bool"),
    "complex64": ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' has dtype torch.complex64"),
    "float8": ({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "'a' has dtype torch.float8_e4m3fn"),
    "nan": ({"a": torch.tensor([1.0, float("nan"), 2.0])}, "1 of the 3 values", "'a'", "NaN", "earlier state"),
    "inf": ({"a": torch.full((2,), -float("inf")).half()}, "2 of the 2 values", "'a'", "infinite"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "'a' has layout torch.sparse_coo"),
    "number": ({"a": 1.0}, "'a' is of float"),
    "name-number": ({1: torch.zeros(2)}, "1 is of Tensor"),
    "name-metadata": ({"__metadata__": torch.zeros(2)}, "tensor named '__metadata__'"),
    "name-up": ({"../a": torch.zeros(2)}, "tensor named '../a'"),
}
UNWRITABLE = {
    "no-type": ({"r": 2}, "peft_type is missing"),
    "set": ({"peft_type": "LORA", "target_modules": {"q"}}, "cannot be written as JSON", "set"),
    "nan": ({"peft_type": "LORA", "lora_alpha": float("nan")}, "cannot be written as JSON"),
    "mixed-keys": ({"peft_type": "LORA", 1: 2}, "cannot be written as JSON"),
    "large": ({"peft_type": "LORA", "target_modules": ["x" * 1000] * 1000}, "longer than 1000000 bytes"),
}


def assert_not_saved(path, parts, *args):
    before = tree(path)
    with pytest.raises(AdapterFileError) as caught:
        write_adapter(path, *args)
    for part in parts:
        assert part in str(caught.value)
    assert tree(path) == before


@pytest.mark.parametrize("case", UNSAVABLE)
def test_tensors_that_are_not_saved(adapter, case):
    tensors, *parts = UNSAVABLE[case]
    assert_not_saved(adapter, [WEIGHTS, *parts], tensors, SETTINGS)


@pytest.mark.parametrize("case", UNWRITABLE)
def test_configurations_that_are_not_saved(adapter, case):
    config, *parts = UNWRITABLE[case]
    assert_not_saved(adapter, [CONFIG, str(adapter), *parts], some_tensors(1), config)


def test_side_data_that_is_not_saved(adapter):
    assert_not_saved(adapter, ["weights_sha256"], some_tensors(1), SETTINGS, {"weights_sha256": "0"})
    assert_not_saved(adapter, [SIDE, "cannot be written"], some_tensors(1), SETTINGS, {"a": object()})


def test_places_where_nothing_is_saved(adapter, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(AdapterFileError, match="file is a file, not a directory"):
        write_adapter(path, some_tensors(), SETTINGS)
    with pytest.raises(AdapterFileError, match="cannot save to .*file/below"):
        write_adapter(path / "below", some_tensors(), SETTINGS)
    assert path.read_text() == "mine"
    os.unlink(adapter / CONFIG)
    os.mkdir(adapter / CONFIG)
    assert_not_saved(adapter, [CONFIG, "is a directory"], some_tensors(1), SETTINGS)


@pytest.mark.parametrize("place", [None, 3, b"somewhere", ["somewhere"]])
def test_what_is_no_path(place):
    for call in (
        lambda: write_adapter(place, some_tensors(), SETTINGS),
        lambda: read_adapter(place),
        lambda: adapter_directory(place, "style"),
    ):
        with pytest.raises(AdapterFileError, match="is not the path of a directory"):
            call()


def test_no_sharded_tensors():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(AdapterFileError, match="'a' is sharded"):
        files._check_savable("a", torch.zeros(2).as_subclass(Sharded), "here")


@pytest.mark.parametrize("name", ["default", "x", "my-adapter_2", "_a", "-a", "a" * 64, "Default", "lora"])
def test_adapter_names(tmp_path, name):
    expected = str(tmp_path) if name == "default" else str(tmp_path / name)
    assert adapter_directory(tmp_path, name) == expected


@pytest.mark.parametrize("name", ["default", "other", "my-adapter_2"])
def test_an_adapter_lies_where_peft_puts_it(tmp_path, name):
    peft_model(name=name).save_pretrained(tmp_path)
    assert read_config(adapter_directory(tmp_path, name))["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "v1.0",
        CONFIG,
        "a/b",
        "/abs",
        "../up",
        "a b",
        " ",
        "a\n",
        "a\0",
        "ü",
        "a" * 65,
        "a\\b",
        None,
        7,
        b"a",
    ],
)
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(AdapterFileError, match="cannot be an adapter's name: 1 to 64 letters"):
        adapter_directory(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    ["lora_A", "lora_B", "weight", "bias", "base_layer", "modules_to_save"],
)
def test_names_with_another_meaning(tmp_path, name):
    with pytest.raises(AdapterFileError, match="cannot be an adapter's name: it has another meaning"):
        adapter_directory(tmp_path, name)


@pytest.mark.parametrize("name", ["train", "keys", "training", "type", "forward"])
def test_names_that_torch_has_taken(tmp_path, name):
    """peft fails on these half-way, in torch's ModuleDict."""
    with pytest.raises(KeyError, match="already exists"):
        peft_model(name=name)
    with pytest.raises(AdapterFileError, match=f"'{name}' cannot be an adapter's name: it has another meaning"):
        adapter_directory(tmp_path, name)
