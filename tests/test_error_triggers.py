"""What raises those error texts that no other test does: one way into each, and what it says.

A trigger is a function of a directory of its own and of monkeypatch; all that it does before the refusal is legal.
"""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import save
from torch import nn

import fastpeft
from fastpeft import (
    check_lora_model,
    cost,
    demo_corpus,
    distributed,
    files,
    journal,
    mapping,
    quantised,
    safetensors_header,
    table_file,
    targets,
)
from fastpeft.errors import AdapterFileError, ConfigError, FastpeftError, OpError, PatchError, TargetError
from fastpeft.integrations import trainer_trl
from fastpeft.ops import prompt_embedding
from tests.models import tiny
from tests.peft_pair import quietly

LORA = {"r": 2, "target_modules": ["q_proj"]}


def lora(**more):
    return fastpeft.LoraConfig(**{**LORA, **more})


def patched(family="llama", **more):
    return fastpeft.patch(tiny(family), lora(**more))


def saved(directory, model=None, **side):
    """The directory of an adapter, whose side file has these values too."""
    fastpeft.save_adapter(model or patched(), directory)
    path = Path(directory, "fastpeft.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **side}))
    return directory


def of_peft():
    return quietly(peft.get_peft_model, tiny(), peft.LoraConfig(**LORA))


class Convolved(nn.Module):
    """A model of one convolution with groups."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(6, 6, 3, groups=3)

    def forward(self, x):
        return self.mix(x)


class Closing:
    """A file whose `read` gives too little, or fails."""

    def __init__(self, path, read):
        path.write_bytes(b"four")
        self.file, self.read = path.open("rb"), read

    def fileno(self):
        return self.file.fileno()

    def seek(self, place):
        self.file.seek(place)


def no_memory(size):
    raise MemoryError


def fails(self, *args, **kwargs):
    raise OSError(5, os.strerror(5))


def a_shared_layer(path, monkeypatch):
    model = tiny()
    model.model.layers[1].self_attn.layer_idx = 0
    fastpeft.patch(model, fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def english(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    demo_corpus.english(100)


def python_sources(path, monkeypatch):
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda name: str(path))
    demo_corpus.python_sources(100)


def unreadable_text(path, monkeypatch):
    (path / "a.txt").write_text("text")
    monkeypatch.setattr(type(path), "open", fails)
    demo_corpus.from_file(path / "a.txt")


def flattened(path, monkeypatch):
    model = tiny()
    model.lm_head.weight._fsdp_flattened = True
    fastpeft.patch(model, lora())


def sharded_state_dict(path, monkeypatch):
    monkeypatch.setattr(distributed, "is_sharded", lambda tensor: True)
    distributed._whole_parameter("w", nn.Parameter(torch.zeros(1)), "is a part", {"w": torch.zeros(1)})


def options_that_are_no_object(path, monkeypatch):
    fastpeft.load_adapter(tiny(), saved(path, options=[1]))


def replaced_without_end(path, monkeypatch):
    monkeypatch.setattr(journal, "_ATTEMPTS", 2)
    monkeypatch.setattr(journal._Snapshot, "still_true", lambda snapshot: False)
    files.read_adapter(saved(path))


def a_method_without_a_tuner(path, monkeypatch):
    monkeypatch.setattr(fastpeft.LoraConfig, "tuner", "")
    mapping.tuner_of(lora())


def a_merged_adapter_s_state_dict(path, monkeypatch):
    model = patched()
    values = fastpeft.get_peft_model_state_dict(model)
    model.merge_adapter()
    fastpeft.set_peft_model_state_dict(model, values)


def a_state_dict_of_integers(path, monkeypatch):
    model = patched()
    values = fastpeft.get_peft_model_state_dict(model)
    fastpeft.set_peft_model_state_dict(model, {key: value.int() for key, value in values.items()})


def layers_that_differ(path, monkeypatch):
    pairs = [(torch.zeros(1, 2, 3, 4),) * 2, (torch.zeros(1, 4, 3, 2),) * 2]
    fastpeft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=2)


def quirks_of_another(path, monkeypatch):
    model = fastpeft.patch(tiny("llama", "QUESTION_ANS"), lora(task_type="QUESTION_ANS"))
    fastpeft.save_adapter(model, path)
    fastpeft.hotswap_adapter(model, saved(path, model, hf_quirks=True))


def of_another_task(path, monkeypatch):
    config = lora(task_type="SEQ_CLS", modules_to_save=None)
    fastpeft.save_adapter(patched(), path)
    values = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**values, "task_type": config.task_type}))
    fastpeft.hotswap_adapter(patched(task_type="CAUSAL_LM"), path)


def an_integer_weight(path, monkeypatch):
    model = tiny()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.ones(32, 32).double())
    fastpeft.patch(model, lora(init_lora_weights="pissa"))


def a_parallel_wrapper(path, monkeypatch):
    wrapper = nn.Module()
    wrapper.module = patched()
    fastpeft.report(wrapper)


def with_ligers_head(path, monkeypatch):
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = tiny()
    alone = {"rope": False, "rms_norm": False, "swiglu": False}
    quietly(apply_liger_kernel_to_llama, model=model, fused_linear_cross_entropy=True, **alone)
    fastpeft.patch(quietly(peft.get_peft_model, model, peft.LoraConfig(r=2, target_modules=["lm_head"])))


def without_peft(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fastpeft.get_peft_model(tiny(), lora(), mixed=True)


def a_position_too_many(path, monkeypatch):
    config = fastpeft.PrefixTuningConfig(num_virtual_tokens=64, task_type="CAUSAL_LM")
    fastpeft.patch(tiny("gpt2"), config)


def more_layers_than_configured(path, monkeypatch):
    model = tiny()
    model.config.num_hidden_layers = 1
    fastpeft.patch(model, fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


class Broken(io.BytesIO):
    read = fails


def a_table_that_cannot_be_read(path, monkeypatch):
    monkeypatch.setattr(table_file, "open_regular", lambda *args: Broken())
    table_file.read(str(path / "t.json"))


def no_table(path, monkeypatch):
    (path / "t.json").write_text("{}")
    table_file.existing(str(path / "t.json"), "a GPU")


def a_prefix_and_two_packed_rows(path, monkeypatch):
    config = fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = fastpeft.patch(tiny(), config)
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    model(input_ids=torch.ones(2, 6, dtype=torch.long), use_cache=False, **packed)


def a_check_of_an_embedding(path, monkeypatch):
    model = patched()
    monkeypatch.setattr(type(model.model.layers[0].self_attn.q_proj), "plain_base", lambda layer: False)
    check_lora_model.lora_layers(model)


def a_reference_under_fsdp(path, monkeypatch):
    trainer_trl._check_one_model({"model": patched(), "args": SimpleNamespace(fsdp="full_shard")})


def a_reference_with_fewer_triplets(path, monkeypatch):
    config = fastpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"])
    model = fastpeft.patch(tiny(), config)
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_E["default"].data = layer.lora_E["default"].data[:2]
    trainer_trl._copy_active(model)


def a_rank_of_grouped_convolutions(path, monkeypatch):
    model = fastpeft.patch(Convolved(), lora(r=3, target_modules=["mix"]))
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)


def an_embedding_made_ready(path, monkeypatch):
    fastpeft.prepare_model_for_compiled_hotswap(patched(target_modules=["embed_tokens"]), target_rank=4)


def another_rank_of_groups(path, monkeypatch):
    fastpeft.save_adapter(fastpeft.patch(Convolved(), lora(r=3, target_modules=["mix"])), path)
    fastpeft.hotswap_adapter(fastpeft.patch(Convolved(), lora(r=6, target_modules=["mix"])), path)


def biases_of_another(path, monkeypatch):
    fastpeft.save_adapter(patched("llama-bias", bias="all"), path)
    fastpeft.hotswap_adapter(patched("llama-bias", bias="all"), path)


def too_wide_for_half_precision(path, monkeypatch):
    model = patched()
    model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(1e30)
    fastpeft.save_adapter(model, path)
    narrow = fastpeft.patch(tiny(dtype=torch.float16), lora(), autocast_adapter_dtype=False)
    fastpeft.hotswap_adapter(narrow, path)


def weighted_convolutions(path, monkeypatch):
    model = fastpeft.patch(Convolved(), lora(r=3, target_modules=["mix"]))
    model.add_adapter("b", lora(r=3, target_modules=["mix"]))
    fastpeft.add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], "c", "svd")


# name -> (class, words of the text, trigger)
TRIGGERS = {
    "layers of one index": (TargetError, "more than one attention module for one layer", a_shared_layer),
    "another method's class": (
        ConfigError,
        "peft_type='PREFIX_TUNING': a LoraConfig is for LORA",
        lambda path, _: fastpeft.LoraConfig.from_dict({"peft_type": "PREFIX_TUNING"}),
    ),
    "many patterns": (
        ConfigError,
        r"regular expressions are more than",
        lambda path, _: lora(rank_pattern={f"layers.{number}.(q|v)_proj": 2 for number in range(2000)}).validate(),
    ),
    "more samples than there are": (
        OpError,
        r"served=\(\(3, 2\),\): 3 samples; at most B=2 are wanted",
        lambda path, _: cost.mixed_lora_linear("forward", B=2, S=1, K=4, N=4, served=((3, 2),), itemsize=2),
    ),
    "no English": (FastpeftError, "this Python lacks pydoc_data", english),
    "no Python": (FastpeftError, "holds 0 Python sources, too few for a demo", python_sources),
    "unreadable text": (FastpeftError, "a.txt: cannot be read: Input/output error", unreadable_text),
    "a part of a parameter": (PatchError, "lm_head.weight belongs to a FullyShardedDataParallel: ", flattened),
    "a sharded state dict": (PatchError, "state_dict: w is sharded in it too", sharded_state_dict),
    "a file that became shorter": (
        AdapterFileError,
        "w became shorter while it was read",
        lambda path, _: files._read_all(Closing(path / "f", lambda size: b"fou"), "w"),
    ),
    "a file larger than memory": (
        AdapterFileError,
        "w has 4 bytes, more than there is memory for",
        lambda path, _: files._read_all(Closing(path / "f", no_memory), "w"),
    ),
    "what safetensors refuses": (
        AdapterFileError,
        "w is refused by safetensors: ",
        lambda path, _: files._decode_tensors(b"\1" * 20, {}, "w"),
    ),
    "another header": (
        AdapterFileError,
        "w: safetensors reads another header than was checked",
        lambda path, _: files._decode_tensors(save({"a": torch.zeros(2)}), {}, "w"),
    ),
    "options that are no object": (ConfigError, r"must be an object, not \[1\]", options_that_are_no_object),
    "files without rest": (AdapterFileError, "are being replaced without end", replaced_without_end),
    "no tuner": (ConfigError, "LoraConfig names no tuner", a_method_without_a_tuner),
    "a merged adapter's dict": (PatchError, "default is merged; unmerge first", a_merged_adapter_s_state_dict),
    "a dict of integers": (AdapterFileError, "is a torch.int32; a tensor of finite", a_state_dict_of_integers),
    "layers that differ": (ConfigError, "layer 1 has 4 heads of 2, layer 0 2 of 4", layers_that_differ),
    "quirks of another": (ConfigError, "hf_quirks is True there, and False of 'default'", quirks_of_another),
    "another task": (ConfigError, "task_type is", of_another_task),
    "a weight of another dtype": (ConfigError, "has a weight of dtype torch.float64; float is", an_integer_weight),
    "a wrapper": (PatchError, "the patched model is inside this Module; give that", a_parallel_wrapper),
    "peft's head and Liger's loss": (PatchError, "patch: the adapter changes the model's head", with_ligers_head),
    "mixed without peft": (ConfigError, "mixed=True is peft's", without_peft),
    "a rank between groups": (
        ConfigError,
        "mix has 3 groups, which must divide the rank; r is 2",
        lambda path, _: fastpeft.patch(Convolved(), lora(target_modules=["mix"])),
    ),
    "more tokens than positions": (ConfigError, "positions for virtual and real tokens together", a_position_too_many),
    "more layers than are configured": (
        ConfigError,
        "num_layers=1: this LlamaForCausalLM has 2 layers that attend",
        more_layers_than_configured,
    ),
    "no file of weights": (
        AdapterFileError,
        "nothing does not exist. Give the path of a safetensors file",
        lambda path, _: safetensors_header.read_header(path / "nothing"),
    ),
    "a layer without tensors": (
        PatchError,
        "this ReLU holds no tensor of its own",
        lambda path, _: quantised.storage(nn.ReLU()),
    ),
    "a table that fails": (table_file.TableError, "t.json cannot be read: Input", a_table_that_cannot_be_read),
    "a backward that is not its forward's": (
        table_file.TableError,
        "backward is 'concat'; with forward 'merge' it is 'merge'",
        lambda path, _: table_file._plan("prefix_attention", {"forward": "merge", "backward": "concat"}),
    ),
    "no table": (table_file.TableError, "is no table of measured choices and is left as it is: its schema", no_table),
    "patched twice, of peft": (
        PatchError,
        "is patched already; fastpeft.unpatch",
        lambda path, _: fastpeft.patch(fastpeft.patch(of_peft())),
    ),
    "a report of peft's own": (PatchError, "is not patched", lambda path, _: fastpeft.report(of_peft())),
    "named twice": (PatchError, "'default' is named twice", lambda path, _: patched().set_adapter(["default"] * 2)),
    "another's class in a file": (
        ConfigError,
        "has task_type='SEQ_CLS'; AutoPeftModelForCausalLM is for",
        lambda path, _: fastpeft.AutoPeftModelForCausalLM.from_pretrained(
            saved(path, fastpeft.patch(tiny("llama", "SEQ_CLS"), lora(task_type="SEQ_CLS")))
        ),
    ),
    "packed rows": (PatchError, "cu_seq_lens_k with a batch of 2: packed sequences", a_prefix_and_two_packed_rows),
    "no dense weight to check": (FastpeftError, "only layers with a dense weight", a_check_of_an_embedding),
    "a reference under FSDP": (PatchError, "under FSDP and DeepSpeed TRL shards", a_reference_under_fsdp),
    "a reference with fewer triplets": (PatchError, "it has lost triplets", a_reference_with_fewer_triplets),
    "groups made ready": (PatchError, "mix is a convolution with groups, whose rank", a_rank_of_grouped_convolutions),
    "an embedding made ready": (PatchError, "cannot be made ready; exclude it", an_embedding_made_ready),
    "another rank of groups": (PatchError, "they must be equal", another_rank_of_groups),
    "biases of another": (ConfigError, "bias='all' trains the base model's biases", biases_of_another),
    "too wide for half precision": (
        AdapterFileError,
        "torch.float16 in this model cannot",
        too_wide_for_half_precision,
    ),
    "weighted convolutions": (PatchError, "mix is a convolution with groups, whose factors", weighted_convolutions),
    "a start of no samples": (
        OpError,
        r"prompt_embedding: start has shape \(2,\); \(1,\) is needed",
        lambda path, _: prompt_embedding(
            torch.ones(1, 3, dtype=torch.long), torch.zeros(4, 2), torch.zeros(1, 2), start=torch.zeros(2).long()
        ),
    ),
    "the same name again": (
        PatchError,
        "load_adapter: there is already an adapter 'default'",
        lambda path, _: fastpeft.load_adapter(patched(), saved(path)),
    ),
    "what is no model": (
        TargetError,
        "expected a torch.nn.Module to adapt, not list",
        lambda path, _: targets.resolve_targets([], lora()),
    ),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_it_is_refused_in_these_words(name, tmp_path, monkeypatch):
    kind, words, trigger = TRIGGERS[name]
    with pytest.raises(FastpeftError, match=words) as caught:
        trigger(tmp_path, monkeypatch)
    assert type(caught.value) is kind
