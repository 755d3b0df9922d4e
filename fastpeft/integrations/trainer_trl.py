"""What TRL's trainers do with a PeftModel and not with a model that `fastpeft.patch` has patched.

Their loss does not call the model's head: a function that they put on the model calls what is below the head, and
multiplies by `lm_head.weight` itself. On a patched model it belongs behind the adapters, which put virtual tokens in
front of a call, and it has to read the trained copy of a head; a LoRA on the head it cannot see. And the reference of
DPO and GRPO is the model itself with other adapters, so that no second model is made.
"""

import contextlib
import dataclasses
import functools
import inspect
import os

from torch import nn
from torch.nn import functional as F

from fastpeft.adapters import disable_adapter, use_adapter
from fastpeft.configs import LoraConfig, as_config
from fastpeft.encoders import has_network
from fastpeft.errors import PatchError
from fastpeft.integrations.trainer_checkpoints import AdapterCheckpoints, is_patched
from fastpeft.mapping import tuner_of
from fastpeft.patching import add_planned, adding, layers, patch, remove_adapter, state_of, unpatch
from fastpeft.rollback import put_back_on_failure
from fastpeft.tuners.lora import LoraLayer
from fastpeft.tuners.saved_modules import SavedModule

REFERENCE = "ref"  # what TRL calls the copy of an adapter that the policy is compared with
IGNORED = -100  # the label that a loss leaves out


class SFT(AdapterCheckpoints):
    """TRL's class of this name, for a model patched by fastpeft too; `peft_config=` patches the model that is given.

    Checkpoints are those of `fastpeft.integrations.trainer.Trainer`. Raises PatchError, before anything is changed, for
    a LoRA on the head, which TRL's loss passes by.
    """

    def __init__(self, model, *args, **kwargs):
        given = _arguments(self, model, args, kwargs)
        with _undone_on_failure(given):
            native = _adapt(given)
            super().__init__(**given)
            if native:
                put_trl_behind(self.model)


class DPO(AdapterCheckpoints):
    """TRL's class of this name, for a model patched by fastpeft too; `peft_config=` patches the model that is given.

    Without `ref_model` the reference is the model itself: with its adapters disabled where `peft_config` is given, else
    with a frozen copy of the active adapter as it is at the start, which is called "ref" and is in every checkpoint.
    Checkpoints are those of `fastpeft.integrations.trainer.Trainer`. Raises PatchError, before anything is changed, for
    a LoRA on the head, which TRL's loss passes by, and for what needs a second model.
    """

    def __init__(self, model, *args, **kwargs):
        given = _arguments(self, model, args, kwargs)
        new = given.get("peft_config") is not None
        if given.get("ref_model") is None:
            _check_one_model(given)
        with _undone_on_failure(given):
            native = _adapt(given)
            if native and given.get("ref_model") is None:
                given["ref_model"] = _reference(given, new)
            if native and getattr(given.get("args"), "disable_dropout", True):
                _without_dropout(given["model"])
            super().__init__(**given)
            if isinstance(given.get("ref_model"), Reference):
                given["ref_model"].prepare()
            elif native:
                put_trl_behind(self.model)


class GRPO(AdapterCheckpoints):
    """TRL's class of this name, for a model patched by fastpeft too; `peft_config=` patches the model that is given.

    If `beta` is not zero, the reference is the model itself, as for `DPOTrainer`. Checkpoints are those of
    `fastpeft.integrations.trainer.Trainer`. Raises PatchError, before anything is changed, for a LoRA on the head,
    which TRL's loss passes by, and for what needs a second model.
    """

    def __init__(self, model, *args, **kwargs):
        given = _arguments(self, model, args, kwargs)
        new, settings = given.get("peft_config") is not None, given.get("args")
        if getattr(settings, "use_vllm", False) and _is_ours(given):
            raise PatchError(
                "use_vllm=True: TRL hands vLLM the weights of a peft.PeftModel with its adapters merged, and knows "
                "none of fastpeft.patch; give it fastpeft.get_peft_model(model, config), or generate without vLLM"
            )
        if getattr(settings, "beta", 0.0):
            _check_one_model(given)
        with _undone_on_failure(given):
            native = _adapt(given)
            beta = settings.beta if native and settings is not None else 0.0
            reference = _reference(given, new) if beta else None
            if native and getattr(settings, "disable_dropout", False):
                _without_dropout(given["model"])
            if not beta:
                super().__init__(**given)
            else:
                try:
                    settings.beta = 0.0  # with which TRL loads no second model
                    super().__init__(**given)
                finally:
                    settings.beta = beta
                self.beta, self.ref_model = beta, reference
            if native:
                put_trl_behind(self.model)


def _arguments(trainer, model, args: tuple, kwargs: dict) -> dict:
    """The arguments of TRL's own class by name."""
    function = super(AdapterCheckpoints, trainer).__init__
    return dict(inspect.signature(function).bind(model, *args, **kwargs).arguments)


def _adapt(given: dict) -> bool:
    """Patch the model with `peft_config`, as TRL would wrap it; whether the model is a patched one. Raises PatchError
    for one that TRL cannot train."""
    model, config = given["model"], given.get("peft_config")
    if config is not None and isinstance(model, nn.Module) and _is_base(model):
        from transformers import set_seed

        set_seed(getattr(given.get("args"), "seed", 42))
        given["model"] = model = patch(model, config)
        given["peft_config"] = None
    elif config is not None and isinstance(model, str):
        raise PatchError(f"peft_config beside model={model!r}: load the model first, and give the trainer that")
    elif config is not None and is_patched(model):
        names = ", ".join(map(repr, state_of(model).configs))
        raise PatchError(f"peft_config beside a model that is patched and has {names}; leave one of them out")
    if not is_patched(model):
        return False
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer):
        raise PatchError(
            "a LoRA on the model's head is not trained under TRL, which multiplies by the head's weight itself; take "
            "the head out of target_modules, or name it in modules_to_save"
        )
    return True


@contextlib.contextmanager
def _undone_on_failure(given: dict):
    """Around the making of a trainer: if it fails, a model that is patched, or was to be, is as it was given."""
    if not _is_ours(given):
        yield
        return
    model = given["model"]
    state = model.__dict__.get("_fastpeft")
    forward = getattr(state, "original_forward", None)
    adapters = [(layer._fastpeft.adapters, dict(layer._fastpeft.adapters)) for _, layer in layers(model)]
    names = () if state is None else tuple(state.configs)
    with put_back_on_failure(model):
        try:
            yield
        except BaseException:
            if state is None and is_patched(model):
                unpatch(model)
            elif state is not None:
                state.original_forward = forward
                if REFERENCE not in names:
                    remove_adapter(model, state, REFERENCE)
                for held, before in adapters:
                    held.update(before)
            raise


def _is_ours(given: dict) -> bool:
    """Whether the model is patched, or will be."""
    model = given["model"]
    to_be = given.get("peft_config") is not None and isinstance(model, nn.Module) and _is_base(model)
    return to_be or is_patched(model)


def _is_base(model: nn.Module) -> bool:
    return not is_patched(model) and not any(cls.__module__.startswith("peft.") for cls in type(model).__mro__)


def put_trl_behind(model: nn.Module) -> None:
    """Let the adapters' part of a call come before TRL's function, which stands on the model; `model._fastpeft` is its
    PatchState."""
    state, fused = state_of(model), model.__dict__.pop("forward", None)
    if fused is None:  # a TRL that calls models as they are
        return
    behind = state.original_forward or functools.partial(state.original_class.forward, model)

    @functools.wraps(state.original_class.forward)
    def forward(*args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return behind(*args, **kwargs)
        kwargs.pop("logits_to_keep", None)  # by which logits of virtual tokens are left out
        rows = kwargs.get("inputs_embeds")
        rows = kwargs.get("input_ids") if rows is None else rows
        if (labels := kwargs.get("labels")) is not None and rows is not None:
            kwargs["labels"] = F.pad(labels, (rows.shape[1] - labels.shape[1], 0), value=IGNORED)
        with _trained_head(model):
            return fused(*args, fused_lm_head=True, **kwargs)

    state.original_forward = forward


@contextlib.contextmanager
def _trained_head(model: nn.Module):
    """Inside, the head that the model tells of is the copy that a call would use."""
    head = model.get_output_embeddings()
    used = head.used() if isinstance(head, SavedModule) else []
    if used:
        model.__dict__["get_output_embeddings"] = lambda: head.modules_to_save[used[-1]]
    try:
        yield
    finally:
        if used:
            del model.__dict__["get_output_embeddings"]


class Reference(nn.Module):
    """A patched model with the adapter `name` in place of the active ones; None is the base model."""

    def __init__(self, model: nn.Module, name: str | None):
        super().__init__()
        self.model, self.name, self.prepared = model, name, False

    @property
    def config(self):
        return self.model.config

    def forward(self, *args, **kwargs):
        """For TRL, which puts a function of its own in its place."""
        return self(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.prepare()
        with disable_adapter(self.model) if self.name is None else use_adapter(self.model, self.name):
            return self.model(*args, **kwargs)

    def prepare(self) -> None:
        """Before the first call, which may be while the trainer is made: see `put_trl_behind`."""
        if not self.prepared:
            put_trl_behind(self.model)
        self.prepared = True


def _reference(given: dict, new: bool) -> Reference:
    """What the policy is compared with. `new`: its adapter was made just now, beside which the base is the
    reference."""
    model = given["model"]
    return Reference(model, None if new else _copy_active(model))


def _check_one_model(given: dict) -> None:
    """Raises PatchError where TRL would need a second model beside one that is patched, or is to be."""
    settings = given.get("args")
    if not _is_ours(given):
        return
    if getattr(settings, "sync_ref_model", False):
        raise PatchError("sync_ref_model=True needs a second model; give one as ref_model, or set it to False")
    engines = [getattr(settings, name, None) for name in ("fsdp", "deepspeed")]
    engines += [os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")]
    if any(engines):
        raise PatchError(
            "under FSDP and DeepSpeed TRL shards the reference by itself, and here it is the model; use "
            "fastpeft.get_peft_model instead of patch, whose model TRL knows"
        )


def _without_dropout(model: nn.Module) -> None:
    """What TRL does to torch's modules for dropout, and LoRA has none of those; of all adapters, a reference's too."""
    for _, layer in layers(model):
        for name, settings in layer._fastpeft.adapters.items():
            if getattr(settings, "dropout", 0.0):
                layer._fastpeft.adapters[name] = dataclasses.replace(settings, dropout=0.0)


def _copy_active(model: nn.Module) -> str:
    """Add a frozen copy of the active adapter, and return its name. Raises PatchError if there is not one to copy."""
    state = state_of(model)
    if len(state.active) != 1 or REFERENCE in state.configs:
        have = ", ".join(map(repr, state.configs))
        raise PatchError(
            f"the reference is a copy, called {REFERENCE!r}, of the one active adapter; active are "
            f"{', '.join(map(repr, state.active)) or 'none'}, and there are {have}. Use set_adapter or delete_adapter"
        )
    (name,) = state.active
    config = as_config(state.configs[name])
    config.inference_mode = True
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # the base was changed for the adapter, and is as the copy needs it
    plan = tuner_of(config).plan(model, config)
    plan = plan.resuming() if has_network(model, name) else plan
    with adding(model, REFERENCE):
        add_planned(model, state, plan, REFERENCE, init=False, quirky=name in state.quirky)
        for path, layer in layers(model):
            if name not in layer._fastpeft.adapters:
                continue
            mine = layer.parameters_of(REFERENCE)
            for key, tensor in layer.parameters_of(name).items():
                if mine[key].shape != tensor.shape:
                    raise PatchError(f"{path}.{key} of {name!r} cannot be copied: it has lost triplets; give ref_model")
                mine[key].data = tensor.detach().clone()
    return REFERENCE
