"""Hugging Face peft's model and ours, made of one base, and the comparisons that each parity test makes of the two."""

import contextlib
import copy
import functools
import io
import json
import re
import warnings
from pathlib import Path

import torch

from tests.models import batch, tiny

WEIGHTS = "adapter_model.safetensors"


def quietly(function, *args, **kwargs):
    """The function's result, without the warnings of either library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def base_name(name: str, prompts: bool = False) -> str:
    """The name that a parameter of a PeftModel has in the base model, which is its name in a model we patched; with
    `prompts` of one whose base is not wrapped. A gated prompt has no adapter's name in peft."""
    for part in (".base_layer", ".original_module"):
        name = name.replace(part, "")
    name = re.sub(r"(attn)\.model\.", r"\1.", name)
    name = re.sub(r"(\.adaption_(?:prompt|gate))\.\w+$", r"\1", name)
    return name.removeprefix("base_model." if prompts else "base_model.model.").removeprefix("base_model.")


def by_base_name(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model of either kind under the names they have in ours."""
    prompts = getattr(model, "_is_prompt_learning", False)
    return {base_name(name, prompts): parameter for name, parameter in model.named_parameters()}


def patched_pair(family: str, settings: dict, *, task: str = "CAUSAL_LM", dtype=torch.float32, **options):
    """(peft's model, ours) from one seed and one configuration."""
    return pair_of(lambda: tiny(family, task, dtype), {"task_type": task, **settings}, **options)


def pair_of(build, settings: dict, kind: str = "LoraConfig", **options):
    """(peft's model, ours) of what `build()` returns, in eval mode (peft's dropout is in train mode otherwise). Ours
    does as peft does also where that is wrong."""
    import peft

    import fastpeft

    if kind == "LoraConfig":
        settings = {"r": 4, "lora_alpha": 8, **settings}
    models = []
    as_in_peft = functools.partial(fastpeft.patch, hf_quirks=True)
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, as_in_peft)):
        base = build()
        torch.manual_seed(11)
        config = getattr(library, kind)(**copy.deepcopy(settings))
        models.append(quietly(wrap, base, config, **options).eval())
    return models


@torch.no_grad()
def randomise(*models: torch.nn.Module, seed: int = 13) -> None:
    """Give everything trainable the same random offset in all models, so that no adapter is neutral."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(by_base_name(model).items()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float, floor: float = 0.0) -> None:
    """Asserts agreement to `rtol` of the greatest value, where rounding errors of sums are, or to `floor`."""
    atol = max(floor, rtol * float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def result(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The logits, whatever the task calls them."""
    return logits_of(model(**inputs))


def logits_of(output) -> torch.Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


def assert_same_start(hf, ours) -> None:
    """Every parameter: name, value bit for bit, dtype, requires_grad."""
    expected, found = by_base_name(hf), by_base_name(ours)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == parameter.dtype, name
        assert found[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(found[name], parameter), name


def assert_same_step(hf, ours, inputs: dict, rtol: float = 1e-5) -> None:
    """Loss, logits and the gradient of everything trainable."""
    outputs = [model(**inputs) for model in (hf, ours)]
    close(outputs[1].loss, outputs[0].loss, rtol)
    close(result(ours, inputs), result(hf, inputs), rtol)
    for model, output in zip((hf, ours), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    assert_same_gradients(hf, ours, 10 * rtol)


def assert_same_gradients(hf, ours, rtol: float) -> None:
    """After a backward pass of each."""
    found, expected = by_base_name(ours), by_base_name(hf)
    greatest = max(float(each.grad.abs().max()) for each in expected.values() if each.grad is not None)
    for name, parameter in expected.items():
        assert (found[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            # the gradient of a key's bias is zero, and rounding errors of the others
            close(found[name].grad, parameter.grad, rtol, floor=1e-3 * rtol * greatest)
    assert greatest > 0


def assert_same_files(hf, ours, directory: Path) -> None:
    """The weights' files byte for byte, and the configurations' but for how target_modules are abbreviated."""
    quietly(hf.save_pretrained, directory / "hf")
    quietly(ours.save_pretrained, directory / "ours")
    assert (directory / "ours" / WEIGHTS).read_bytes() == (directory / "hf" / WEIGHTS).read_bytes()
    configs = [json.loads((directory / who / "adapter_config.json").read_text()) for who in ("hf", "ours")]
    for config in configs:
        if config.get("modules_to_save"):
            config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))  # peft adds a task's twice
        if config["peft_type"] in ("LORA", "ADALORA"):
            del config["target_modules"]
            config["exclude_modules"] = sorted(config["exclude_modules"] or ())
            config["target_parameters"] = sorted(config["target_parameters"] or ())  # of mixtral a set, in peft
    assert configs[0] == configs[1]


@torch.no_grad()
def assert_interchangeable(hf, ours, build, inputs: dict, directory: Path, **options) -> None:
    """Each library loads what the other has saved (see `assert_same_files`), and computes the same with it."""
    import peft

    import fastpeft

    by_peft = quietly(peft.PeftModel.from_pretrained, build(), directory / "ours", **options)
    assert torch.equal(result(by_peft, inputs), result(hf, inputs))
    by_us = quietly(fastpeft.load_adapter, build(), directory / "hf", **options)
    assert torch.equal(result(by_us, inputs), result(ours, inputs))


def assert_same_line(hf, ours) -> None:
    """What `print_trainable_parameters` prints, which differs from an empty model's."""
    printed = []
    for model in (hf, ours):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        printed.append(out.getvalue())
    assert printed[0] == printed[1] and not printed[1].startswith("trainable params: 0 ")


@torch.no_grad()
def assert_same_merged(hf, ours, inputs: dict, rtol: float = 1e-5) -> None:
    """The outputs of the two merged plain models, and of ours before and after."""
    before = result(ours, inputs)
    merged = quietly(ours.merge_and_unload)
    found = result(merged, inputs)
    close(found, before, rtol)
    close(found, result(quietly(hf.merge_and_unload), inputs), rtol)
    assert merged is ours and not hasattr(ours, "peft_config")


def assert_same(build, settings: dict, task: str, directory: Path, rtol: float = 1e-5, **options) -> None:
    """All of the above, in one life of a pair of models."""
    hf, ours = pair_of(build, {"task_type": task, **settings}, **options)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    inputs = batch(task)
    assert_same_step(hf, ours, inputs, rtol)
    assert_same_files(hf, ours, directory)
    assert_interchangeable(hf, ours, build, inputs, directory, **options)
    assert_same_merged(hf, ours, inputs, rtol)
