"""What is no name, no flag, no model: refused in words by every public call, with errors of our own."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, quietly, result
from tests.two_adapters import config, trained, two


def refused(call, model, error, *words) -> None:
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, fastpeft.FastpeftError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert differences(before, snapshot(model)) == []


SEVERAL = [5, None, [["a"]], {"a": 1}, ["a", 3], Ellipsis, b"a"]  # are neither a name nor a list of names


@pytest.mark.parametrize("given", SEVERAL, ids=repr)
def test_what_names_no_adapters(given):
    model = two()
    calls = {
        "set_adapter": lambda: fastpeft.set_adapter(model, given),
        "use_adapter": lambda: fastpeft.use_adapter(model, given).__enter__(),
    }
    if given is not None:  # which means the active ones
        calls["merge"] = lambda: fastpeft.merge(model, given)
        calls["merge_and_unload"] = lambda: fastpeft.merge_and_unload(model, given)
        calls["save_pretrained"] = lambda: model.save_pretrained("/nowhere", selected_adapters=given)
    for name, call in calls.items():
        refused(call, model, fastpeft.PatchError, f"{name}: ", "names no adapter; give a name, or a list of names")


@pytest.mark.parametrize("given", [["a"], 5, ("a",)], ids=repr)
def test_what_names_no_one_adapter(given, tmp_path):
    model = two()
    for call in (
        lambda: fastpeft.delete_adapter(model, given),
        lambda: fastpeft.save_adapter(model, tmp_path, adapter_name=given),
        lambda: fastpeft.adapter_state_dict(model, given),
    ):
        refused(call, model, fastpeft.PatchError, "adapter", repr(given))
    refused(lambda: fastpeft.delete_adapter(model, None), model, fastpeft.PatchError, "delete_adapter: None")
    assert list(tmp_path.iterdir()) == []


def test_one_name_stands_for_a_list_of_one(tmp_path):
    model = two()
    with torch.no_grad(), fastpeft.use_adapter(model, "b"):
        expected = result(model, batch())
    for call in (lambda: fastpeft.merge(model, "b"), lambda: model.merge_adapter("b")):
        call()
        assert model._fastpeft.merged == ("b",)
        close(result(model, batch()), expected, 1e-5)
        fastpeft.unmerge(model)
    model.save_pretrained(tmp_path, selected_adapters="b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()
    close(result(model.merge_and_unload(adapter_names="b"), batch()), expected, 1e-5)


@pytest.mark.parametrize("place", [None, 3, b"x", ["x"]], ids=repr)
def test_what_is_no_directory(place):
    model = two()
    for call in (
        lambda: fastpeft.save_adapter(model, place),
        lambda: model.save_pretrained(place),
        lambda: fastpeft.load_adapter(model, place, adapter_name="c"),
        lambda: model.load_adapter(place, "c"),
    ):
        refused(call, model, fastpeft.AdapterFileError, repr(place), "is not the path of a directory")


@pytest.mark.parametrize("value", ["yes", 1, 0, "no"], ids=repr)
def test_what_is_neither_true_nor_false(value, tmp_path):
    fastpeft.save_adapter(two(), tmp_path, adapter_name="a")
    plain, patched = tiny(), two()
    for model, call, name in (
        (plain, lambda: fastpeft.patch(plain, config(), hf_quirks=value), "hf_quirks"),
        (plain, lambda: fastpeft.patch(plain, config(), autocast_adapter_dtype=value), "autocast_adapter_dtype"),
        *(
            (plain, lambda name=name: fastpeft.load_adapter(plain, tmp_path / "a", **{name: value}), name)
            for name in ("trainable", "autocast_adapter_dtype", "hf_quirks")
        ),
        (patched, lambda: patched.add_adapter("c", config(), autocast_adapter_dtype=value), "autocast_adapter_dtype"),
        (patched, lambda: fastpeft.set_adapter(patched, "b", trainable=value), "trainable"),
    ):
        refused(call, model, fastpeft.PatchError, f"{name}={value!r} must be True or False")
    with pytest.raises(fastpeft.PatchError, match="hf_quirks=None"):
        fastpeft.patch(plain, config(), hf_quirks=None)


def test_quirks_in_a_file_are_true_or_false(tmp_path):
    import json

    fastpeft.save_adapter(fastpeft.patch(tiny(), config()), tmp_path)
    side = json.loads((tmp_path / "fastpeft.json").read_text())
    (tmp_path / "fastpeft.json").write_text(json.dumps({**side, "hf_quirks": "maybe"}))
    model = tiny()
    refused(lambda: fastpeft.load_adapter(model, tmp_path), model, fastpeft.AdapterFileError, "hf_quirks='maybe'")


@pytest.mark.parametrize("given", [None, "a model", nn.Linear], ids=repr)
def test_parameters_of_what_is_no_model(given):
    for call in (fastpeft.print_trainable_parameters, fastpeft.count_parameters):
        with pytest.raises(fastpeft.PatchError, match=f"{type(given).__name__} cannot be counted"):
            call(given)


def test_parameters_of_a_model_without_any():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        fastpeft.print_trainable_parameters(nn.Identity())
    assert out.getvalue() == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_deleting_leaves_what_is_frozen_as_it_is():
    """Unless another adapter takes the deleted one's place: that trains, as in peft."""
    model = two()
    model.add_adapter("c", config(r=2))
    model.set_adapter("a", inference_mode=True)
    model.delete_adapter("c")
    assert trained(model) == set()
    quietly(model.delete_adapter, "a")
    assert model.active_adapters == ["b"] and trained(model) == {"b"}


# backend="triton"


@pytest.mark.interpreter
def test_a_rank_beyond_what_registers_hold_is_served():
    """In slices of ranks, so that Triton may be demanded of any rank."""
    model = fastpeft.patch(tiny(), config(r=300), backend="triton")
    model.add_adapter("b", config(rank_pattern={"layers.1.self_attn.v_proj": 257}))
    assert {row.backend for row in fastpeft.report(model).layers} == {"triton"}
    plain = fastpeft.patch(tiny(), config(r=300))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".b." not in key})
    close(result(model, batch()), result(plain, batch()), 1e-5)


@pytest.mark.interpreter
def test_what_no_kernel_serves_is_refused_by_patch_and_by_what_adds_adapters(tmp_path):
    words = "the triton backend was demanded but cannot serve this call: torch.float64 is not served"
    half = config(target_modules=["layers.0.self_attn.v_proj"])
    every, model = config(target_modules=["v_proj"]), tiny()
    model.model.layers[1].self_attn.v_proj.double()
    refused(lambda: fastpeft.patch(model, every, backend="triton"), model, fastpeft.BackendError, words)
    fastpeft.save_adapter(fastpeft.patch(tiny(), every), tmp_path)
    fastpeft.patch(model, half, backend="triton")
    refused(lambda: model.add_adapter("b", every), model, fastpeft.BackendError, words)
    refused(lambda: model.load_adapter(tmp_path, "b"), model, fastpeft.BackendError, words)
    embeddings = config(target_modules=["embed_tokens"])  # which no kernel serves, and none has to
    fastpeft.patch(tiny(dtype=torch.float64), embeddings, backend="triton")
    for backend in (None, "auto", "torch"):
        fastpeft.patch(tiny(dtype=torch.float64), every, backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_an_interpreter_triton_is_refused_by_patch():
    """In a process of its own, as triton is asked once whether it interprets."""
    code = """
import fastpeft
from tests.models import differences, snapshot, tiny
prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
for config in ({"peft_type": "LORA"}, prefix):
    model = tiny()
    before = snapshot(model)
    try:
        fastpeft.patch(model, config, backend="triton")
    except fastpeft.BackendError as error:
        assert "demanded but cannot serve this call: CPU tensors need TRITON_INTERPRET=1" in str(error), error
    else:
        raise AssertionError("accepted")
    assert differences(before, snapshot(model)) == []
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
