"""AdaLoRA's schedule: the budget's formula, the budget kept exactly, going on bit for bit, what a step costs, and what
is refused. That the ranks are peft's is in test_hf_parity_adalora."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.files import read_adapter, write_adapter
from fastpeft.journal import ENCODER
from fastpeft.rank_allocator import RankAllocator, budget_at
from tests.adalora_pair import SCHEDULE, TARGETS, adam, ours_alone, pair, pattern, ranks, train
from tests.models import batch, tiny
from tests.peft_pair import quietly, randomise

TOTAL = 6 * 6  # layers, init_r


@pytest.mark.parametrize("settings", [{}, {"deltaT": 3}, {"tinit": 0, "tfinal": 0}, {"target_r": 6}, {"target_r": 0}])
def test_the_budget_is_that_of_peft(settings):
    import peft
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    settings = {**SCHEDULE, **settings}
    config, layers = fastpeft.AdaLoraConfig(**settings), 7
    theirs = Theirs(torch.nn.Module(), peft.AdaLoraConfig(**settings), "default")
    theirs.init_bgt, theirs.target_bgt = config.init_r * layers, config.target_r * layers
    for step in range(70):
        assert budget_at(config, step, layers) == theirs.budget_schedule(step), step


def equal_scores(model) -> RankAllocator:
    """An allocator for which all triplets are equally important."""
    allocator = RankAllocator(model, "default")
    for layer in allocator.layers:
        found = allocator.ranks(layer)
        found.importance = [torch.ones_like(p) for p in layer.parameters_of("default").values()]
        found.uncertainty = [torch.ones_like(p) for p in layer.parameters_of("default").values()]
    return allocator


@torch.no_grad()
@pytest.mark.parametrize("budget", [0, 1, 17, 35, 36, 50])
def test_the_budget_is_kept_exactly_where_triplets_are_equal(budget):
    """peft sets all of them to zero that are not above the threshold."""
    model = ours_alone(**TARGETS)
    randomise(model)
    values = {name: p.clone() for name, p in model.named_parameters()}
    equal_scores(model).allocate(budget)
    assert sum(ranks(model).values()) == sum(map(sum, pattern(model).values())) == min(budget, TOTAL)
    for path, kept in pattern(model).items():
        before, after = values[f"{path}.default"], model.get_parameter(f"{path}.default")
        assert torch.equal(after, before * torch.tensor(kept).view(-1, 1))


@torch.no_grad()
def test_the_budget_is_what_peft_misses_with_equal_triplets():
    hf, ours = pair("llama", **TARGETS)
    randomise(hf, ours)
    allocator = hf.base_model.rankallocator
    for name, parameter in hf.base_model.model.named_parameters():
        if "lora_" in name:
            allocator.exp_avg_ipt[name] = allocator.exp_avg_unc[name] = torch.ones_like(parameter)
    allocator.mask_to_budget(hf.base_model.model, 17)
    equal_scores(ours).allocate(17)
    assert (sum(ranks(hf).values()), sum(ranks(ours).values())) == (0, 17)


@pytest.mark.parametrize("target_r", [6, 8])
def test_a_target_that_is_not_below_the_start_takes_nothing_away(target_r, tmp_path):
    """peft fails at the first allocation."""
    model = ours_alone(target_r=target_r, **TARGETS)
    with pytest.warns(UserWarning, match=f"target_r={target_r} is not below init_r=6"):
        fastpeft.AdaLoraConfig(**{**SCHEDULE, "target_r": target_r}).validate_new()
    train(model, adam(model), range(1, 61))
    assert set(ranks(model).values()) == {6}
    assert all(all(kept) for kept in pattern(model).values())
    model.save_pretrained(tmp_path)
    assert torch.isfinite(fastpeft.load_adapter(tiny(), tmp_path)(**batch()).loss)


# Saving and going on.


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("at", "dtype"), [*((at, torch.float32) for at in (3, 5, 20, 30, 49, 50, 53)), (20, torch.bfloat16)]
)
def test_training_goes_on_bit_for_bit(at, dtype, tmp_path):
    """In each phase; at 20 and 30 in the middle of the schedule, where values that were dropped grow again."""
    model = ours_alone(deltaT=4, dtype=dtype, **TARGETS)
    optimizer = adam(model)
    train(model.train(), optimizer, range(1, at + 1))
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, range(at + 1, 61))

    resumed = fastpeft.load_adapter(tiny(dtype=dtype), tmp_path, trainable=True).train()
    again = adam(resumed)
    again.load_state_dict(saved)
    assert train(resumed, again, range(at + 1, 61)) == expected
    wanted, found = state(model), state(resumed)
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert pattern(resumed) == pattern(model) and resumed.peft_config["default"].total_step == 60


def test_what_training_needs_is_gone_with_it(tmp_path):
    model = ours_alone(**TARGETS)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / ENCODER).exists()  # nothing yet
    train(model, adam(model), range(1, 21))
    model.save_pretrained(tmp_path)
    assert (tmp_path / ENCODER).exists()
    frozen = fastpeft.load_adapter(tiny(), tmp_path)
    frozen.save_pretrained(tmp_path / "frozen")
    assert not (tmp_path / "frozen" / ENCODER).exists()
    train(model, adam(model), range(21, 51))  # ranks are settled, importances done with
    model.save_pretrained(tmp_path)
    assert {key.rpartition(".")[2] for key in read_adapter(tmp_path).encoder} == {"dropped"}


@pytest.mark.parametrize("by", ["peft", "us"])
def test_a_pruned_adapter_trains_on(by, tmp_path):
    """peft fails at the next allocation: its masks are longer than what is left."""
    hf, ours = pair("llama", **TARGETS)
    source = hf if by == "peft" else ours
    train(source, adam(source), range(1, 31))
    quietly(source.save_pretrained, tmp_path)
    if by == "us":
        (tmp_path / ENCODER).unlink()
        (tmp_path / "fastpeft.json").unlink()
    left = sum(map(sum, pattern(source).values()))
    model = fastpeft.load_adapter(tiny(), tmp_path, trainable=True).train()
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_E" in name) == left
    first = pattern(model)
    seen = []
    train(model, adam(model), range(31, 61), after=lambda step: seen.append(sum(ranks(model).values())))
    budgets = [min(left, budget_at(model.peft_config["default"], step, 6)[0]) for step in range(31, 51)]
    assert seen[:20] == budgets and seen[20:] == [18] * 10
    settled = pattern(model)
    assert all(was or not is_left for path in first for was, is_left in zip(first[path], settled[path], strict=True))
    model.save_pretrained(tmp_path / "again")
    for trainable in (False, True):
        loaded = fastpeft.load_adapter(tiny(), tmp_path / "again", trainable=trainable)
        assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits) or not trainable
        assert pattern(loaded) == settled


def test_a_twice_pruned_adapter_goes_on_bit_for_bit(tmp_path):
    """Its layers have some of the triplets of the start, and of these some are dropped."""
    model = ours_alone(**{**TARGETS, "target_r": 2})
    train(model, adam(model), range(1, 39))
    assert min(ranks(model).values()) == 0  # and one has none
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / ENCODER).unlink()
    (tmp_path / "a" / "fastpeft.json").unlink()
    model = fastpeft.load_adapter(tiny(), tmp_path / "a", trainable=True)
    optimizer = adam(model)
    train(model, optimizer, range(39, 43))
    model.save_pretrained(tmp_path / "b")
    saved = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, range(43, 61))
    resumed = fastpeft.load_adapter(tiny(), tmp_path / "b", trainable=True)
    again = adam(resumed)
    again.load_state_dict(saved)
    assert train(resumed, again, range(43, 61)) == expected
    assert pattern(resumed) == pattern(model)


def spoiled(tensors: dict, how: str) -> dict:
    if " of " not in how:
        return {**tensors, how: torch.ones(3)}
    if how.startswith("none of"):
        return {key: tensor for key, tensor in tensors.items() if how.split(" of ")[1] not in key}
    if how.startswith("one of"):
        return {**tensors, how.split(" of ")[1]: torch.ones(1)}
    name = next(key for key in tensors if how.split(" of ")[-1] in key)
    if how.startswith("gone"):
        return {key: tensor for key, tensor in tensors.items() if key != name}
    return {**tensors, name: torch.cat((tensors[name], tensors[name]), 1)}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone of lora_A.dropped", "lora_A.dropped has shape none in the saved state of training"),
        ("wide of lora_B.dropped", "lora_B.dropped has shape"),
        ("wide of lora_A.exp_avg_ipt", "lora_A.exp_avg_ipt has shape"),
        ("gone of lora_E.exp_avg_unc", "lora_E.exp_avg_unc has shape none"),
        ("none of model.layers.1.self_attn.v_proj", "no importances for 'model.layers.1.self_attn.v_proj'"),
        ("one of model.layers.0.self_attn.q_proj.positions", "triplets in the adapter's file, and . beside it; they"),
        ("some.layer.lora_A.dropped", "'some.layer.lora_A.dropped' belong to no layer"),
        ("model.layers.0.self_attn.q_proj.positions", "is not a list of different numbers from 0 to 5"),
    ],
)
def test_a_state_of_training_that_does_not_fit_is_refused(how, words, tmp_path):
    model = ours_alone(**TARGETS)
    train(model, adam(model), range(1, 25))
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    side = {key: value for key, value in found.side.items() if not key.endswith("sha256")}
    write_adapter(tmp_path, found.tensors, found.config, side, spoiled(found.encoder, how))
    plain = tiny()
    with pytest.raises(fastpeft.AdapterFileError, match=words):
        fastpeft.load_adapter(plain, tmp_path, trainable=True)
    assert not hasattr(plain, "peft_config")


# What a step costs.


class Counted(TorchDispatchMode):
    """How often values are fetched from the device, and how many calls there are."""

    def __init__(self):
        super().__init__()
        self.fetched, self.calls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls.append(name)
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.fetched.append(name)
        return func(*args, **(kwargs or {}))


def counted_step(layers: int, step: int, monkeypatch) -> Counted:
    config = {**SCHEDULE, "target_modules": "all-linear"}
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2
    )
    model = fastpeft.patch(LlamaForCausalLM(small), fastpeft.AdaLoraConfig(task_type="CAUSAL_LM", **config))
    model(**batch()).loss.backward()
    fastpeft.update_and_allocate(model, 1)
    transfers = []
    monkeypatch.setattr(torch.Tensor, "tolist", _noted(torch.Tensor.tolist, transfers))
    with Counted() as counted:
        fastpeft.update_and_allocate(model, step)
    counted.fetched += transfers
    monkeypatch.undo()
    return counted


def _noted(function, calls):
    def noted(self):
        calls.append("tolist")
        return function(self)

    return noted


@pytest.mark.parametrize(("step", "fetches"), [(3, 0), (20, 1), (50, 1)])
def test_a_step_waits_once_where_it_allocates_and_else_never(step, fetches, monkeypatch):
    assert len(counted_step(2, step, monkeypatch).fetched) == fetches


def test_a_step_has_as_many_calls_for_many_layers_as_for_few(monkeypatch):
    few, many = (counted_step(layers, 20, monkeypatch).calls for layers in (1, 8))
    launches = [[name for name in calls if name not in VIEWS] for calls in (few, many)]
    assert len(launches[0]) == len(launches[1]) < 80, launches[0]  # five shapes of layers


VIEWS = ("aten::view", "aten::select.int", "aten::slice.Tensor", "aten::unbind.int", "aten::detach", "aten::alias")


def test_the_orthogonal_term_has_as_many_calls_for_many_matrices_as_for_few():
    from fastpeft.tuners.orthogonality import mean_distance

    counts = []
    for count in (2, 50):
        matrices = [torch.randn(3, 8) for _ in range(count)]
        with Counted() as counted:
            mean_distance(matrices, [m.mT for m in matrices], torch.device("cpu"))
        counts.append(len([name for name in counted.calls if name not in VIEWS]))
        assert counted.fetched == []
    assert counts[1] - counts[0] <= 48  # the transposes that the test makes


# What is refused, and changes nothing.


def test_a_missing_gradient_is_named():
    model = ours_alone(**TARGETS)
    with pytest.raises(
        fastpeft.PatchError, match=r"18 of 18 parameters have no gradient, the first is .*0.*lora_A; call"
    ):
        fastpeft.update_and_allocate(model, 1)
    model(**batch()).loss.backward()
    model.get_parameter("model.layers.1.self_attn.v_proj.lora_E.default").grad = None
    before = state(model)
    with pytest.raises(fastpeft.PatchError, match=r"1 of 18 .* the first is model.layers.1.self_attn.v_proj.lora_E;"):
        fastpeft.update_and_allocate(model, 20)
    assert all(torch.equal(state(model)[name], before[name]) for name in before)
    assert RankAllocator(model, "default").ranks(next(iter(RankAllocator(model, "default").layers))).importance is None


@pytest.mark.parametrize("step", [-1, 1.0, True, "3", None])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(fastpeft.PatchError, match="global_step=.*an int from 0 up"):
        fastpeft.update_and_allocate(ours_alone(), step)


def test_what_cannot_be_allocated_is_said(tmp_path):
    with pytest.raises(fastpeft.PatchError, match="is not patched"):
        fastpeft.update_and_allocate(tiny(), 1)
    lora = fastpeft.patch(tiny(), fastpeft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(fastpeft.PatchError, match="no AdaLoRA adapter is active; active are 'default'"):
        fastpeft.update_and_allocate(lora, 1)
    model = ours_alone(**TARGETS)
    with pytest.raises(
        fastpeft.PatchError, match=r"step 50 is not before total_step - tfinal = 50.*at every step from 1"
    ):
        fastpeft.update_and_allocate(model, 50)
    model.save_pretrained(tmp_path)
    frozen = fastpeft.load_adapter(tiny(), tmp_path)
    with pytest.raises(fastpeft.PatchError, match="'default' is frozen; load it with trainable=True"):
        fastpeft.update_and_allocate(frozen, 1)
    frozen.peft_config["default"].total_step = None  # as a file that only says what inference needs
    frozen.set_adapter("default")
    with pytest.raises(fastpeft.PatchError, match="'default' has no total_step, and so no schedule; set"):
        fastpeft.update_and_allocate(frozen, 1)


def test_an_infinite_gradient_is_said():
    model = ours_alone(**TARGETS)
    randomise(model)
    model(**batch()).loss.backward()
    model.get_parameter("model.layers.1.self_attn.v_proj.lora_E.default").grad[2] = torch.inf
    before = state(model)
    with pytest.raises(fastpeft.PatchError, match="importances are NaN or infinite because a gradient was"):
        fastpeft.update_and_allocate(model, 20)
    assert all(torch.equal(state(model)[name], before[name]) for name in before) and pattern(model) is None


def test_a_missed_last_allocation_is_made_later():
    """peft would keep the ranks of an earlier one, above the target."""
    model = ours_alone(**TARGETS)
    optimizer = adam(model)
    train(model, optimizer, range(1, 50))
    assert sum(ranks(model).values()) >= 18
    train(model, optimizer, range(52, 54))
    assert sum(ranks(model).values()) == 18


def test_gradients_are_accumulated_over_batches():
    """One call for each optimizer step: two halves of a batch are the batch."""
    found = []
    for halves in (1, 2):
        model = ours_alone(dtype=torch.float64, orth_reg_weight=0.0, **TARGETS)
        optimizer = adam(model)
        inputs = {key: value[:1].repeat(2, 1) for key, value in batch().items()}
        for step in range(1, 31):
            for half in range(halves):
                rows = slice(None) if halves == 1 else slice(half, half + 1)
                (model(**{key: value[rows] for key, value in inputs.items()}).loss / halves).backward()
            optimizer.step()
            fastpeft.update_and_allocate(model, step)
            optimizer.zero_grad()
        found.append(pattern(model))
    assert found[0] == found[1]
