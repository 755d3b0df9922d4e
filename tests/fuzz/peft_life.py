"""The life of a patched PeftModel in random steps, beside a PeftModel that is not patched and takes the same ones."""

import contextlib
import copy
import io
import itertools
import pickle
import statistics
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastpeft
from fastpeft.errors import PatchError
from fastpeft.integrations.peft.layers import FUSED
from fastpeft.integrations.peft.swapping import Swapped, full_name
from tests.counting import count
from tests.fuzz.judging import autocast_to
from tests.fuzz.models_life import NAMES, TARGETS, TASKS
from tests.models import batch, tiny
from tests.peft_pair import quietly, result

WEIGHTS = "adapter_model.safetensors"
ROWS = 3
MORE_TARGETS = {"llama": ["v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["v", "wo"], "bert": ["dense"]}
LAYERED = ("lora", "rank-stabilised", "elsewhere", "dropout", "lora-bias", "dora")
KINDS = (*LAYERED, "adalora", "prefix", "projection", "prompt", "p-tuning", "llama-adapter")
HALVES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far two ways of rounding may lie apart, as shares of a tensor's greatest value.
LOGITS, GRADIENTS = {None: 1e-5, "bf16": 0.05, "fp16": 0.01}, {None: 1e-4, "bf16": 0.25, "fp16": 0.05}


def config(family: str, kind: str):
    """A small configuration of this kind, of peft's own class."""
    import peft

    task = {"task_type": TASKS[family]}
    targeted, virtual = {"target_modules": TARGETS[family], **task}, {"num_virtual_tokens": 2, **task}
    elsewhere = {"target_modules": MORE_TARGETS[family], **task}
    made = {
        "lora": lambda: peft.LoraConfig(r=2, **targeted),
        "rank-stabilised": lambda: peft.LoraConfig(r=5, lora_alpha=3, use_rslora=True, **targeted),
        "elsewhere": lambda: peft.LoraConfig(r=3, **elsewhere),
        "dropout": lambda: peft.LoraConfig(r=2, lora_dropout=0.3, **targeted),
        "lora-bias": lambda: peft.LoraConfig(r=2, lora_bias=True, **elsewhere),
        "dora": lambda: peft.LoraConfig(r=3, use_dora=True, lora_alpha=5, **targeted),
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, tinit=1, total_step=50, **targeted),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "projection": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=4, **virtual),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=4, **virtual),
        "llama-adapter": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **task),
    }
    return made[kind]()


def stir(model, name: str) -> None:
    """Random values in one adapter's parameters, so that it is not neutral."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            if name in path.split("."):
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference, as a share of the greatest value."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().amax()
    return float(difference / expected.double().abs().amax().clamp(min=1e-30)) if found.numel() else 0.0


class Twins(RuleBasedStateMachine):
    """`theirs` and `ours`: the two models; `saved`: directories of the two. What peft refuses, it refuses of ours in
    the same words."""

    family = "llama"
    names = st.sampled_from(NAMES)
    several = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)
    kinds = st.sampled_from(KINDS)
    halves = st.sampled_from((None, None, *HALVES))
    lengths = st.sampled_from((4, 9))

    @initialize(kind=kinds, name=names)
    def begin(self, kind, name):
        import peft

        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.numbers, self.saved = itertools.count(1), {}
        self.theirs, self.ours = (tiny(self.family, TASKS[self.family]) for _ in range(2))
        self.patched, self.like = False, kind  # the kind that is added more often than others
        made = self.both(lambda base: peft.get_peft_model(base, config(self.family, kind), adapter_name=name))
        if made is None:  # the family has no such kind
            self.like = "lora"
            made = self.both(lambda base: peft.get_peft_model(base, config(self.family, "lora"), adapter_name=name))
        self.theirs, self.ours = made
        self.both(lambda model: stir(model, name))
        self.patch()

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()

    @property
    def pair(self) -> tuple:
        return self.theirs, self.ours

    def both(self, action):
        """(what it returns of theirs, of ours), or None if peft refuses it of both."""
        seed, outcomes = next(self.numbers), []
        for model in self.pair:
            torch.manual_seed(seed)
            try:
                outcomes.append((quietly(action, model), None))
            except Exception as error:
                outcomes.append((None, error))
        (expected, error), (found, own) = outcomes
        assert (type(own), str(own)) == (type(error), str(error)), f"ours: {own!r}, peft's: {error!r}"
        return None if error else (expected, found)

    def agree(self, action, bound: float, as_near=None) -> bool:
        """Whether peft does it; then the results, tensors by name, are the same up to rounding. Where both may be
        farther off than `bound`, `as_near` says whether ours are as near to the truth as peft's."""
        results = self.both(action)
        if results is None:
            return False
        expected, found = results
        assert found.keys() == expected.keys(), f"{sorted(found)} instead of {sorted(expected)}"
        greatest = max((float(each.abs().amax()) for each in expected.values() if each.numel()), default=0.0)
        for name, each in expected.items():
            if each.numel() and not (self.is_nothing(each, greatest) and self.is_nothing(found[name], greatest)):
                distance = far(found[name], each)
                near = distance <= bound or (as_near is not None and as_near())
                assert near, f"{name}: {distance:.2g} of the greatest value away, above {bound}"
        return True

    def as_near(self, gradients, half: str) -> bool:
        """Whether in half precision the gradients of ours are in most batches as near to those in fp32 as peft's. Of
        one batch it is chance which are nearer, as the forward's roundings decide, and one may be several times the
        other."""
        models, distances = [copy.deepcopy(each) for each in self.pair], []
        for length in range(4, 25):
            truth = gradients(models[0], None, length)
            names = [name for name, each in truth.items() if each.any()]
            both = (gradients(model, half, length) for model in models)
            distances.append([sum(far(each[name], truth[name]) for name in names) for each in both])
        expected, found = map(statistics.median, zip(*distances, strict=True))
        return found <= 1.5 * expected

    @staticmethod
    def is_nothing(each: torch.Tensor, greatest: float) -> bool:
        """The gradient of a key's bias is zero, and rounding errors of the others."""
        return float(each.abs().amax()) <= 1e-5 * greatest

    def inputs(self, length: int) -> dict:
        return batch(TASKS[self.family], ROWS, length)

    # What holds at every moment.

    @invariant()
    def the_same_but_for_classes(self):
        if not hasattr(self, "theirs"):
            return
        states = [model.state_dict() for model in self.pair]
        assert states[0].keys() == states[1].keys()
        assert [name for name, each in states[0].items() if not torch.equal(each, states[1][name])] == []
        theirs, ours = ([(name, p.requires_grad, p.dtype) for name, p in each.named_parameters()] for each in self.pair)
        assert ours == theirs
        assert list(self.ours.peft_config) == list(self.theirs.peft_config)
        assert self.ours.active_adapters == self.theirs.active_adapters
        for (path, own), other in zip(self.ours.named_modules(), self.theirs.modules(), strict=True):
            assert type(own).__qualname__ == type(other).__qualname__ and own.training == other.training, path
            assert getattr(own, "merged_adapters", None) == getattr(other, "merged_adapters", None), path
            served = self.patched and full_name(type(other)) in FUSED
            assert isinstance(own, Swapped) if served else self.patched or type(own) is type(other), path
        count("steps of PeftModels' lives")

    # What may be done.

    @rule(name=names, kind=kinds, alike=st.integers(0, 3))
    def add(self, name, kind, alike):
        if alike:
            kind = self.like if self.like not in LAYERED else kind if kind in LAYERED else "lora"
        if self.both(lambda model: model.add_adapter(name, config(self.family, kind))):
            self.both(lambda model: stir(model, name))

    @rule(names=several)
    def set(self, names):
        if len(names) == 1:
            self.both(lambda model: model.set_adapter(names[0]))
        else:
            self.both(lambda model: model.base_model.set_adapter(list(names)))

    @rule(name=names)
    def delete(self, name):
        self.both(lambda model: model.delete_adapter(name))

    @rule(names=st.none() | several)
    def merge(self, names):
        self.both(lambda model: model.merge_adapter(adapter_names=names))

    @rule()
    def unmerge(self):
        self.both(lambda model: model.unmerge_adapter())

    @rule(length=lengths, half=halves)
    def call(self, length, half):
        self.agree(lambda model: {"logits": self.logits(model, length, half)}, LOGITS[half])

    @rule(half=halves)
    def disable(self, half):
        def inside(model):
            with model.disable_adapter():
                return {"logits": self.logits(model, 9, half)}

        self.agree(inside, LOGITS[half])

    @precondition(lambda self: self.like in LAYERED)  # elsewhere peft passes over the names, or knows none
    @rule(rows=st.lists(st.sampled_from((*NAMES, "__base__")), min_size=ROWS, max_size=ROWS), half=halves)
    def mix(self, rows, half):
        """A batch with an adapter for each sample."""
        self.agree(lambda model: {"logits": self.logits(model, 9, half, adapter_names=rows)}, LOGITS[half])

    def logits(self, model, length: int, half: str | None, **more) -> torch.Tensor:
        model.eval()  # the dropout of an adapter that was added is in training by itself
        with torch.no_grad(), autocast_to(HALVES[half]):
            return result(model, self.inputs(length) | more)

    @rule(length=lengths, half=halves, training=st.booleans())
    def train(self, length, half, training):
        """A step, of both by peft's gradients, so that rounding does not add up."""
        drops = any(getattr(each, "lora_dropout", 0) for each in self.theirs.peft_config.values())

        def gradients(model, half=half, length=length):
            model.train(training and not drops)
            model.zero_grad()
            with autocast_to(HALVES[half]):
                loss = model(**self.inputs(length)).loss
            if loss.requires_grad:
                loss.backward()
            model.eval()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return {"loss": loss.detach(), **grads}

        if self.agree(gradients, GRADIENTS[half], half and (lambda: self.as_near(gradients, half))):
            for own, other in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
                own.grad = None if other.grad is None else other.grad.clone()
            self.both(self.step)
        else:
            self.both(lambda model: model.eval().zero_grad())

    def step(self, model) -> None:
        held = [each for each in model.parameters() if each.grad is not None]
        if held:
            torch.optim.SGD(held, lr=0.05).step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(5)
        model.zero_grad()

    @rule(name=names)
    def save(self, name):
        place = str(next(self.numbers))
        paths = {id(self.theirs): self.folder / f"theirs{place}", id(self.ours): self.folder / f"ours{place}"}
        if self.both(lambda model: model.save_pretrained(paths[id(model)], selected_adapters=[name])):
            files = [sorted(each.rglob("*")) for each in paths.values()]
            relative = [[f.relative_to(p) for f in found] for p, found in zip(paths.values(), files, strict=True)]
            assert relative[0] == relative[1]
            written = [[each.read_bytes() for each in found if each.name == WEIGHTS] for found in files]
            assert written[0] == written[1] and written[0]
            self.saved[place] = next(each.parent for each in files[1] if each.name == WEIGHTS)

    @precondition(lambda self: self.saved)
    @rule(name=names, which=st.integers(0, 100), trainable=st.booleans())
    def load(self, name, which, trainable):
        path = list(self.saved.values())[which % len(self.saved)]
        self.both(lambda model: model.load_adapter(path, name, is_trainable=trainable))

    @precondition(lambda self: self.saved)
    @rule(name=names, which=st.integers(0, 100), trainable=st.booleans())
    def begin_again(self, name, which, trainable):
        """Another life, from a file."""
        from peft import PeftModel

        path = list(self.saved.values())[which % len(self.saved)]

        def read(_):
            base = tiny(self.family, TASKS[self.family])
            return PeftModel.from_pretrained(base, path, name, is_trainable=trainable)

        if made := self.both(read):
            (self.theirs, self.ours), self.patched = made, False
            self.patch()

    @precondition(lambda self: not self.patched)
    @rule()
    def patch(self):
        """Refused where peft itself knows no adapter to call the model with: layers may name some that are no more."""
        try:
            self.theirs.active_peft_config  # noqa: B018  as every forward begins
        except (KeyError, TypeError):  # by the name of one that is no more, or by [] where a prompt's is deleted
            with pytest.raises(PatchError, match="no adapter is in force"):
                fastpeft.patch(self.ours)
            return
        assert fastpeft.patch(self.ours) is self.ours
        self.patched = True

    @precondition(lambda self: self.patched)
    @rule()
    def unpatch(self):
        assert fastpeft.unpatch(self.ours) is self.ours
        self.patched = False

    @rule(pickled=st.booleans())
    def copy(self, pickled):
        """The life goes on with copies."""

        def copied(model):
            if not pickled:
                return copy.deepcopy(model)
            file = io.BytesIO()
            pickle.dump(model, file)
            return pickle.loads(file.getvalue())

        if made := self.both(copied):
            self.theirs, self.ours = made
