"""Long runs: a step, a patch, an adapter, a swap or a save leaves nothing behind, however often it is done.

Tensors, objects and open files are counted exactly, once everything has been done a few times; memory by a slope.
"""

import gc
import itertools
import math
import mmap
import sys

import pytest
import torch

import fastpeft
from fastpeft.ops import lora_linear, lora_projections, mixed_lora_linear, prefix_attention, prompt_embedding
from tests import growth
from tests.counting import count, how_many
from tests.models import VOCABULARY, batch, differences, snapshot, tiny
from tests.peft_pair import quietly, randomise, result

TASK = {"task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 4, **TASK}
METHODS = {
    "lora": lambda: fastpeft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, **TASK),
    "dora": lambda: fastpeft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, **TASK),
    "adalora": lambda: fastpeft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=10**6, tinit=2, tfinal=10, deltaT=3, target_modules=["q_proj"], **TASK
    ),
    "prefix": lambda: fastpeft.PrefixTuningConfig(**VIRTUAL),
    "projected": lambda: fastpeft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **VIRTUAL),
    "prompt": lambda: fastpeft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: fastpeft.PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL),
    "gated": lambda: fastpeft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **TASK),
}
SPARE = 8 * 2**20  # bytes by which an allocator's own memory may vary over a whole run
OBJECTS = 6  # that Python and torch may make for themselves in a whole run


@pytest.fixture(scope="module", autouse=True)
def thawed_at_last():
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_older(thawed_at_last):
    """What was there before a test is not looked at, which spares most of the time."""
    gc.collect()
    gc.freeze()


def samples(number: int) -> dict[str, torch.Tensor]:
    """The batch of one step: 1 to 3 rows of 5 to 15 tokens, of which some end in padding; 33 shapes in all."""
    rows, length = 1 + number % 3, 5 + 7 * number % 11
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - number % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


SHAPES = 33


def native(method: str, **patching) -> torch.nn.Module:
    return fastpeft.patch(tiny(), METHODS[method](), **patching).train()


def of_peft(kind: str, **settings) -> torch.nn.Module:
    import peft

    model = quietly(peft.get_peft_model, tiny(), getattr(peft, kind)(**TASK, **settings))
    return fastpeft.patch(model).train()


def checkpointed() -> torch.nn.Module:
    model = native("lora")
    quietly(model.gradient_checkpointing_enable, {"use_reentrant": False})
    return model


def of_two() -> torch.nn.Module:
    model = native("lora", adapter_name="a")
    model.add_adapter("b", METHODS["lora"]())
    model.set_adapter(["a", "b"])
    return model


TRAINED = {
    **{name: lambda name=name: native(name) for name in METHODS},
    "checkpointed": checkpointed,
    "mixed": of_two,
    "peft-lora": lambda: of_peft("LoraConfig", r=4, target_modules=["q_proj", "v_proj"]),
    "peft-prefix": lambda: of_peft("PrefixTuningConfig", num_virtual_tokens=4),
}
ADAPTERS = ("a", "b", "__base__")


class Training:
    """Steps of one model, each of another shape than the last one."""

    def __init__(self, name: str):
        torch.manual_seed(3)
        self.name, self.model = name, TRAINED[name]()
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.numbers = itertools.count()

    def step(self) -> float:
        number = next(self.numbers)
        inputs = samples(number)
        if self.name == "mixed":
            inputs["adapter_names"] = [ADAPTERS[(number + row) % 3] for row in range(len(inputs["input_ids"]))]
        loss = self.model(**inputs).loss
        if loss.requires_grad:  # it does not where all rows are the base model's
            loss.backward()
            self.optimizer.step()
        if self.name == "adalora":
            self.model.update_and_allocate(number)
        self.optimizer.zero_grad()
        return loss.item()

    def steps(self, number: int) -> list[float]:
        return [self.step() for _ in range(number)]


@pytest.mark.parametrize("name", TRAINED)
def test_steps_of_changing_shapes_leave_nothing_behind(name):
    training, number = Training(name), how_many(20, 1680)
    training.steps(how_many(12, SHAPES))
    growth.held()  # what only the first collection sees settle
    losses, memory = training.steps(3), []
    before, remembered = growth.held(), growth.caches()
    for _ in range(5):
        losses += training.steps(number // 5)
        memory.append(growth.resident())
    after = growth.held()
    assert after.tensors == before.tensors and after.bytes == before.bytes
    assert after.files <= before.files and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    assert growth.slope(memory) * len(memory) < SPARE
    assert all(map(math.isfinite, losses))
    assert growth.left_to_the_collector(lambda: training.steps(3)) == []
    count("steps held", len(losses) + 3)


def test_generation_leaves_nothing_behind():
    model = native("prefix").eval()
    model.add_adapter("words", METHODS["prompt"]())
    number = how_many(3, 150)

    def decode(times: int) -> None:
        for turn in range(times):
            model.set_adapter(("default", "words")[turn % 2])
            ids = samples(turn)["input_ids"]
            model.generate(ids, max_new_tokens=2 + turn % 3, do_sample=False, pad_token_id=0)

    decode(6)
    growth.held()
    decode(6)
    before, remembered = growth.held(), growth.caches()
    decode(2 * number)
    after = growth.held()
    assert after[:2] == before[:2] and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    count("steps held", 2 * number)


def test_adapters_that_are_added_and_deleted_leave_nothing_behind():
    kept = fastpeft.LoraConfig(r=4, target_modules=["v_proj", "down_proj"], **TASK)
    model = fastpeft.patch(tiny(), kept, adapter_name="stays").eval()
    randomise(model)
    stays, number = result(model, batch()).detach().clone(), how_many(20, 200)

    def life(turn: int, method: str) -> None:
        name = f"adapter-{turn}"  # never the same twice
        model.add_adapter(name, METHODS[method]())
        model.set_adapter(name)
        with torch.no_grad():
            result(model, samples(turn))
        model.set_adapter("stays")
        model.delete_adapter(name)

    for turn, method in enumerate(METHODS):
        life(turn, method)
    growth.held()
    state = snapshot(model)
    for turn, method in enumerate(METHODS):
        life(turn, method)
    before, remembered = growth.held(), growth.caches()
    for turn in range(number):
        life(100 + turn, list(METHODS)[turn % len(METHODS)])
    after = growth.held()
    assert after[:2] == before[:2] and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    assert differences(state, snapshot(model)) == []
    assert list(model.peft_config) == ["stays"] and torch.equal(result(model, batch()), stays)
    assert growth.left_to_the_collector(lambda: [life(999, method) for method in METHODS]) == []
    count("adapters added and deleted", number)


def test_patch_and_unpatch_leave_the_original_bit_for_bit():
    model = tiny().train()
    original, outputs = snapshot(model), result(model, batch()).detach().clone()
    configs = [*METHODS.values(), lambda: fastpeft.LoraConfig(r=2, init_lora_weights="pissa", bias="all", **TASK)]
    number = how_many(40, 1000)

    def cycle(turn: int) -> None:
        fastpeft.patch(model, configs[turn % len(configs)]())
        if turn % 4 == 0:  # another place where something could stay: gradients
            model(**samples(turn)).loss.backward()
        fastpeft.unpatch(model)
        model.zero_grad()

    for turn in range(len(configs)):
        cycle(4 * turn)  # each with gradients: which ops there are is remembered
    growth.held()
    before, remembered = growth.held(), growth.caches()
    for turn in range(number):
        cycle(turn)
        if turn % 100 < len(configs):
            assert differences(original, snapshot(model)) == [], turn
    after = growth.held()
    assert after[:2] == before[:2] and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    assert differences(original, snapshot(model)) == [] and torch.equal(result(model, batch()), outputs)
    assert growth.left_to_the_collector(lambda: [cycle(turn) for turn in range(len(configs))]) == []
    count("patch cycles", number)


def test_patch_and_unpatch_of_a_peft_model_leave_it_bit_for_bit():
    models = [
        fastpeft.unpatch(of_peft("LoraConfig", r=4, target_modules=["q_proj"], use_dora=True)),
        fastpeft.unpatch(of_peft("PrefixTuningConfig", num_virtual_tokens=4)),
        fastpeft.unpatch(of_peft("AdaptionPromptConfig", adapter_len=4, adapter_layers=2)),
    ]
    originals, number = list(map(snapshot, models)), how_many(10, 300)

    def cycles(times: int) -> None:
        for _ in range(times):
            for model in models:
                fastpeft.unpatch(fastpeft.patch(model))

    cycles(2)
    growth.held()
    before, remembered = growth.held(), growth.caches()
    cycles(number)
    after = growth.held()
    assert after[:2] == before[:2] and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    for original, model in zip(originals, models, strict=True):
        assert differences(original, snapshot(model)) == []
    assert growth.left_to_the_collector(lambda: cycles(1)) == []
    count("patch cycles", number * len(models))


@pytest.mark.parametrize("name", TRAINED)
def test_a_patched_model_is_freed_without_the_collector(name):
    TRAINED[name]()
    freed = growth.left_to_the_collector(lambda: TRAINED[name]())
    theirs = [] if not name.startswith("peft-") else growth.left_to_the_collector(lambda: _unpatched(name))
    assert len(freed) == len(theirs)


def _unpatched(name: str) -> None:
    fastpeft.unpatch(TRAINED[name]())


def test_hot_swaps_leave_nothing_behind(tmp_path):
    adapters = {}
    for seed, r in enumerate((4, 2, 3)):
        config = fastpeft.LoraConfig(r=r, target_modules=["q_proj", "up_proj"], **TASK)
        source = fastpeft.patch(tiny(), config).eval()
        randomise(source, seed=seed)
        fastpeft.save_adapter(source, tmp_path / str(seed))
        adapters[tmp_path / str(seed)] = result(source, batch()).detach()
    model = fastpeft.load_adapter(tiny(), tmp_path / "0").eval()
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=4)
    parameters, number = [id(each) for each in model.parameters()], how_many(30, 1000)

    def swap(turn: int) -> None:
        directory, expected = list(adapters.items())[turn % len(adapters)]
        fastpeft.hotswap_adapter(model, directory)
        torch.testing.assert_close(result(model, batch()).detach(), expected, rtol=1e-5, atol=1e-6)

    for turn in range(6):
        swap(turn)
    growth.held()
    before, remembered = growth.held(), growth.caches()
    for turn in range(number):
        swap(turn)
    assert (after := growth.held())[:2] == before[:2]
    assert after.files <= before.files and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    assert [id(each) for each in model.parameters()] == parameters
    count("hot swaps", number)


def test_saving_and_loading_leave_nothing_behind(tmp_path):
    model, number = fastpeft.patch(tiny(), METHODS["lora"](), adapter_name="a").eval(), how_many(12, 300)
    randomise(model)
    expected = result(model, batch()).detach().clone()

    def turn() -> None:
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path / "a", "again")
        model.set_adapter("again")
        assert torch.equal(result(model, batch()), expected)
        model.set_adapter("a")
        model.delete_adapter("again")

    for _ in range(3):
        turn()
    growth.held()
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    before, remembered = growth.held(), growth.caches()
    for _ in range(number):
        turn()
    assert (after := growth.held())[:2] == before[:2]
    assert after.files <= before.files and after.objects - before.objects <= OBJECTS
    assert growth.grown(remembered, growth.caches()) == {}
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == files
    count("saves loaded again", number)


KERNELS = {
    "lora": lambda rows: lora_linear(*_random((rows, 16), (24, 16), (24,), (4, 16), (24, 4)), 2.0, dropout=0.5),
    "mixed": lambda rows: mixed_lora_linear(
        *_random((rows, 3, 16), (24, 16), (24,)), [_random((4, 16))[0]], [_random((24, 4))[0]], [2.0],
        rows=[0, *[-1] * (rows - 1)],
    ),  # fmt: skip
    "projections": lambda rows: torch.cat(
        lora_projections(
            *_random((rows, 16)), _random((24, 16), (8, 16)), None, _random((4, 16), (2, 16)), _random((24, 4), (8, 2)),
            [2.0, 1.0], dropouts=[0.5, 0.0], training=True,
        ), -1,
    ),
    "prefix": lambda rows: prefix_attention(*_random(*[(1, 2, rows, 16)] * 3, *[(2, 3, 16)] * 2)),
    "decode": lambda rows: prefix_attention(
        *_random((1, 2, 1, 16), *[(1, 2, rows, 16)] * 2, *[(2, 3, 16)] * 2), query_start=rows - 1
    ),
    "prompt": lambda rows: prompt_embedding(torch.arange(rows)[None] % 9, *_random((9, 16), (3, 16))),
}  # fmt: skip


def _random(*shapes) -> list[torch.Tensor]:
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


@pytest.mark.interpreter
@pytest.mark.parametrize("op", KERNELS)
def test_kernels_remember_nothing_of_shapes(op):
    def call(*sizes: int) -> None:
        with fastpeft.backend("triton"):
            for rows in sizes:
                KERNELS[op](rows).sum().backward()

    call(3, 20)
    growth.held()
    call(4)
    before, remembered = growth.held(), growth.caches()
    call(5, 7, 11, 19)
    after = growth.held()
    assert growth.grown(remembered, growth.caches()) == {}
    if op != "mixed":  # which remembers the layouts of its last batches
        assert after[:2] == before[:2]


KEPT: list = []


def _remembered(monkeypatch):
    module = sys.modules["fastpeft.selection"]
    monkeypatch.setattr(module, "_by_shape", {}, raising=False)
    return lambda turn: module._by_shape.update({turn: None})


def _cycle(turn: int) -> None:
    module = torch.nn.Linear(2, 2)
    module.itself = [module]


def _touch(memory: mmap.mmap) -> None:
    """Memory of its own, as what an allocator has left over would hide it."""
    memory.write(b"x" * len(memory))
    KEPT.append(memory)


LEAKS = {
    "tensor": lambda monkeypatch: lambda turn: KEPT.append(torch.zeros(3)),
    "object": lambda monkeypatch: lambda turn: KEPT.append([turn]),
    "file": lambda monkeypatch: lambda turn: KEPT.append(open(__file__)),  # noqa: SIM115
    "memory": lambda monkeypatch: lambda turn: _touch(mmap.mmap(-1, 2**20)),
    "cache": _remembered,
    "cycle": lambda monkeypatch: _cycle,
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_seen(leak, monkeypatch):
    step, memory = LEAKS[leak](monkeypatch), []
    before, remembered = growth.held(), growth.caches()
    try:
        for turn in range(20):
            step(turn)
            memory.append(growth.resident())
        after, cycles = growth.held(), growth.left_to_the_collector(lambda: step(20))
        seen = {
            "tensor": after.tensors > before.tensors and after.bytes - before.bytes == 20 * 12,
            "object": after.objects - before.objects > OBJECTS,
            "file": after.files == before.files + 20,
            "memory": growth.slope(memory) * len(memory) > SPARE,
            "cache": growth.grown(remembered, growth.caches()) == {"fastpeft.selection._by_shape": (0, 21)},
            "cycle": any(isinstance(each, torch.nn.Linear) for each in cycles),
        }
    finally:
        for each in KEPT:
            if hasattr(each, "close"):
                each.close()
        KEPT.clear()
    assert seen[leak] and seen["cycle"] == (leak == "cycle")
