"""The life of a patched model in random steps, beside a plain account of what must hold."""

import contextlib
import copy
import io
import itertools
import pickle
import tempfile
import warnings

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastpeft
from tests.counting import count
from tests.interrupted import left_behind, portrait, unlike
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import result

NAMES = ("a", "b", "c")
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"], "bert": ["query", "value"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
KINDS = ("lora", "dora", "adalora", "prefix", "prompt", "p-tuning", "llama-adapter")


def config(family: str, kind: str):
    """A small configuration of this kind."""
    task = {"task_type": TASKS[family]}
    targeted = {"target_modules": TARGETS[family], **task}
    virtual = {"num_virtual_tokens": 2, **task}
    made = {
        "lora": lambda: fastpeft.LoraConfig(r=2, **targeted),
        "dora": lambda: fastpeft.LoraConfig(r=3, use_dora=True, lora_alpha=5, **targeted),
        "adalora": lambda: fastpeft.AdaLoraConfig(init_r=3, target_r=2, total_step=50, **targeted),
        "prefix": lambda: fastpeft.PrefixTuningConfig(**virtual),
        "prompt": lambda: fastpeft.PromptTuningConfig(**virtual),
        "p-tuning": lambda: fastpeft.PromptEncoderConfig(encoder_hidden_size=4, **virtual),
        "llama-adapter": lambda: fastpeft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **task),
    }
    return made[kind]()


class Life(RuleBasedStateMachine):
    """`known`: adapter -> (its kind, its tensors); `active`, `merged`: names; `answers`: what a choice of adapters has
    computed since one of them last changed. A refusal of the library's own kind changes nothing; an error of another
    kind is a failure."""

    family = "llama"
    names = st.sampled_from(NAMES)
    several = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)
    kinds = st.sampled_from(KINDS)

    @initialize(kind=kinds, name=names)
    def begin(self, kind, name):
        self.stack = contextlib.ExitStack()
        self.folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.inputs = batch(TASKS[self.family])
        self.numbers, self.steps = itertools.count(1), 0
        self.model = tiny(self.family, TASKS[self.family])
        self.before, self.base, self.plain = snapshot(self.model), portrait(self.model), self.compute()
        self.is_copy = False  # made of other objects than those of `before`
        self.known, self.active, self.merged, self.answers, self.saved = {}, (), (), {}, {}
        self.patch(kind, name)

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()

    # What holds at every moment.

    @property
    def patched(self) -> bool:
        return "_fastpeft" in self.model.__dict__

    def compute(self) -> torch.Tensor:
        mode = self.model.training
        with torch.no_grad():
            out = result(self.model.eval(), self.inputs)
        self.model.train(mode)
        return out

    def done(self, action) -> bool:
        """Whether the library did it; if it refused, everything is as it was."""
        torch.manual_seed(next(self.numbers))
        before = portrait(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
        except fastpeft.FastpeftError:
            assert unlike(before, portrait(self.model)) == []
            return False
        return True

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {key: each.clone() for key, each in fastpeft.adapter_state_dict(self.model, name).items()}

    def learned(self, kind: str, name: str) -> None:
        """Note an adapter that is new, or has other values."""
        self.known[name] = kind, self.tensors(name)
        self.answers = {names: each for names, each in self.answers.items() if name not in names}

    @invariant()
    def accounts_agree(self):
        if not hasattr(self, "known"):
            return
        assert left_behind() == []
        if not self.patched:
            assert not self.known and differences(self.before, snapshot(self.model)) == []
            return
        assert set(self.model.peft_config) == set(self.known)
        assert tuple(self.model.active_adapters) == self.active and self.model._fastpeft.merged == self.merged
        for name, (_, tensors) in self.known.items():
            found = fastpeft.adapter_state_dict(self.model, name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items()), name
        self.steps += 1
        count("steps of models' lives")

    # What may be done.

    @precondition(lambda self: not self.patched)
    @rule(kind=kinds, name=names)
    def patch(self, kind, name):
        if self.done(lambda: fastpeft.patch(self.model, config(self.family, kind), adapter_name=name)):
            self.active = (name,)
            self.learned(kind, name)
        else:
            assert differences(self.before, snapshot(self.model)) == []

    @precondition(lambda self: self.patched)
    @rule(kind=kinds, name=names)
    def add(self, kind, name):
        if self.done(lambda: self.model.add_adapter(name, config(self.family, kind))):
            assert name not in self.known and not self.merged
            self.learned(kind, name)
        else:
            assert name in self.known or self.merged or len(self.known) > 0

    @precondition(lambda self: self.patched)
    @rule(names=several)
    def set(self, names):
        if self.done(lambda: self.model.set_adapter(names)):
            self.active = tuple(names)
            self.merged = self.merged if self.merged == self.active else ()
        else:
            assert not set(names) <= set(self.known)

    @precondition(lambda self: self.patched)
    @rule(name=names)
    def delete(self, name):
        if self.done(lambda: self.model.delete_adapter(name)):
            del self.known[name]
            rest = tuple(each for each in self.active if each != name)
            if name in self.active and not rest:
                rest = tuple(self.known)[:1]
            if name in self.active and self.merged != rest:
                self.merged = ()
            self.active = rest
            self.answers = {names: each for names, each in self.answers.items() if name not in names}
        else:
            assert name not in self.known or name in self.merged

    @precondition(lambda self: self.patched)
    @rule()
    def merge(self):
        mergeable = all(self.known[name][0] in ("lora", "dora", "adalora") for name in self.active)
        if self.done(lambda: fastpeft.merge(self.model)):
            self.merged = self.merged or self.active
            assert mergeable or self.merged != self.active
        else:
            assert not mergeable

    @precondition(lambda self: self.patched)
    @rule()
    def unmerge(self):
        assert self.done(lambda: fastpeft.unmerge(self.model))
        self.merged = ()

    @precondition(lambda self: self.patched and not self.merged)
    @rule()
    def call(self):
        found = self.compute()
        assert torch.equal(found, self.compute())
        assert torch.equal(found, self.answers.setdefault(self.active, found))
        assert self.active or torch.equal(found, self.plain)

    @precondition(lambda self: self.patched and not self.merged)
    @rule(names=several)
    def use(self, names):
        found = []

        def inside():
            with fastpeft.use_adapter(self.model, names):
                found.append(self.compute())

        if self.done(inside):
            assert torch.equal(found[0], self.answers.setdefault(tuple(names), found[0]))
        else:
            assert not set(names) <= set(self.known)

    @precondition(lambda self: self.patched)
    @rule()
    def disable(self):
        with fastpeft.disable_adapter(self.model):
            assert torch.equal(self.compute(), self.plain)

    @precondition(lambda self: self.patched and not self.merged)
    @rule()
    def train(self):
        held = [each for each in self.model.parameters() if each.requires_grad]
        if not held:
            return
        self.model.train()
        optimizer = torch.optim.SGD(held, lr=0.05)
        self.model(**self.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        for name in self.active:
            self.learned(self.known[name][0], name)

    @precondition(lambda self: self.patched)
    @rule(name=names)
    def save(self, name):
        path = f"{self.folder}/{next(self.numbers)}"
        if self.done(lambda: fastpeft.save_adapter(self.model, path, adapter_name=name)):
            where = path if len(self.known) == 1 or name == "default" else f"{path}/{name}"
            self.saved[where] = self.known[name]
        else:
            assert name not in self.known

    @precondition(lambda self: self.saved)
    @rule(name=names, which=st.integers(0, 100), trainable=st.booleans())
    def load(self, name, which, trainable):
        path = sorted(self.saved)[which % len(self.saved)]
        new = not self.patched
        how = {"adapter_name": name, "trainable": trainable}
        if self.done(lambda: fastpeft.load_adapter(self.model, path, **how)):
            kind, tensors = self.saved[path]
            self.learned(kind, name)
            assert all(torch.equal(self.known[name][1][key], each) for key, each in tensors.items())
            self.active = (name,) if new else self.active
        else:
            assert not new

    @precondition(lambda self: self.patched and self.saved)
    @rule(name=names, which=st.integers(0, 100))
    def hotswap(self, name, which):
        path = sorted(self.saved)[which % len(self.saved)]
        if self.done(lambda: fastpeft.hotswap_adapter(self.model, path, name)):
            self.learned(self.known[name][0], name)
            assert all(torch.equal(self.known[name][1][key], each) for key, each in self.saved[path][1].items())

    @precondition(lambda self: self.patched)
    @rule(pickled=st.booleans())
    def copy(self, pickled):
        """The life goes on with a copy; the original is taken apart, which the copy does not see."""
        if pickled:
            file = io.BytesIO()
            pickle.dump(self.model, file)
            other = pickle.loads(file.getvalue())
        else:
            other = copy.deepcopy(self.model)
        assert unlike(portrait(self.model), portrait(other)) == []
        fastpeft.unpatch(self.model)
        assert unlike(self.base, portrait(self.model)) == []
        assert self.is_copy or differences(self.before, snapshot(self.model)) == []
        self.model, self.is_copy = other, True

    @precondition(lambda self: self.patched)
    @rule()
    def unpatch(self):
        fastpeft.unpatch(self.model)
        assert torch.equal(self.compute(), self.plain) and unlike(self.base, portrait(self.model)) == []
        if self.is_copy:
            self.before, self.is_copy = snapshot(self.model), False
        self.known, self.active, self.merged, self.answers = {}, (), (), {}
