"""Upgrades: where another library has moved something that the package relies on, one message names all of it."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.contract_table import TABLE
from tests.contracts import LIBRARIES, ROOT, Surface, all_moved, from_sources, names_in

SOURCES = from_sources()


def test_nothing_that_is_relied_on_has_moved():
    assert (message := all_moved([*SOURCES, *TABLE])) == "", message


def test_every_library_is_looked_at():
    assert {each.name.split(".")[0] for each in SOURCES} == set(LIBRARIES) - {"accelerate"}
    assert {each.name.split(".")[0] for each in TABLE} == set(LIBRARIES)


def test_the_classes_of_peft_that_are_taken_over_are_there():
    """By their names in its sources, as some are made only where a library for quantisation is installed."""
    from fastpeft.integrations.peft.layers import CONV1D, DORA, FUSED
    from fastpeft.integrations.peft.model import ADAPTION
    from fastpeft.integrations.peft.tuners import TUNERS

    gone = []
    for name in (*FUSED, *TUNERS, ADAPTION, DORA, CONV1D):
        module, _, kind = name.rpartition(".")
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        if not any(isinstance(node, ast.ClassDef) and node.name == kind for node in ast.walk(ast.parse(source))):
            gone.append(name)
    assert gone == []


def test_the_attention_classes_that_have_a_forward_of_ours_are_there():
    from fastpeft.attention.sites import OWN_FORWARD

    paths = [
        f"transformers.models.{name.replace('.', '.modeling_' + name.split('.')[0] + '.')}" for name in OWN_FORWARD
    ]
    assert all_moved([Surface(path, "fastpeft/attention/sites.py") for path in paths]) == ""
    assert set(paths) <= {each.name for each in TABLE}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.name}-{row.where.rpartition('/')[2]}")
def test_a_row_is_about_something_that_the_file_uses(row):
    source = (ROOT / row.where).read_text(encoding="utf-8")
    words = " ".join((row.takes, row.has, row.closes_over, row.is_)).split() or [row.name.rpartition(".")[2]]
    assert [word for word in words if not re.search(rf"\b{word}\b", source)] == []


def test_what_has_moved_is_named_together(monkeypatch):
    import transformers
    from transformers import masking_utils

    def overlay(width):
        return lambda batch, head, query, key: key > query - width

    def checkpointing(self, enable=True, every_n_layers=1):
        return self.gradient_checkpointing_func

    monkeypatch.setattr(transformers.trainer, "TRAINER_STATE_NAME", "state.json")
    monkeypatch.delattr(masking_utils, "eager_mask")
    monkeypatch.delattr(transformers.GenerationMixin, "_prepare_cache_for_generation")
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", overlay)
    monkeypatch.setattr(transformers.PreTrainedModel, "_set_gradient_checkpointing", checkpointing)
    message = all_moved([*SOURCES, *TABLE])
    first, *lines = message.splitlines()
    assert re.fullmatch(rf"{len(lines)} of what fastpeft relies on moved in transformers \S+:", first)
    for expected in (
        "transformers.masking_utils.eager_mask is not there    (fastpeft/attention/masks.py)",
        "transformers.GenerationMixin._prepare_cache_for_generation is not there    (fastpeft/generation.py)",
        "transformers.masking_utils.sliding_window_overlay closes over no sliding_window    "
        "(fastpeft/attention/masks.py)",
        "transformers.trainer.TRAINER_STATE_NAME is 'state.json' and not 'trainer_state.json'    "
        "(fastpeft/integrations/trainer_checkpoints.py)",
        "transformers.PreTrainedModel._set_gradient_checkpointing takes no gradient_checkpointing_func    "
        "(fastpeft/adapted_model.py)",
        "transformers.PreTrainedModel._set_gradient_checkpointing uses no _gradient_checkpointing_func    "
        "(fastpeft/patching.py)",
    ):
        assert f"  {expected}" in lines


def test_an_attribute_that_an_object_no_longer_gets_is_named(monkeypatch):
    import peft.tuners.lora.layer as theirs

    monkeypatch.setattr(theirs, "LoraLayer", type("LoraLayer", (), {"__init__": lambda self: setattr(self, "r", {})}))
    message = all_moved(TABLE)
    assert "peft.tuners.lora.layer.LoraLayer has no scaling    (fastpeft/integrations/peft/layers.py)" in message
    assert "peft.tuners.lora.layer.LoraLayer._check_forward_args is not there" in message


def test_names_are_read_from_a_file_of_ours():
    source = """
import torch.distributed as dist
import fastpeft.errors
def f(x):
    from transformers.masking_utils import sdpa_mask as mask
    import triton.language as tl, triton
    return mask(x).values + dist.ReduceOp.MAX + tl.math.exp(x) + triton.knobs.runtime.interpret + x.shape
"""
    assert names_in(ast.parse(source)) == {
        "torch.distributed", "torch.distributed.ReduceOp.MAX", "transformers.masking_utils.sdpa_mask", "triton",
        "triton.language", "triton.language.math.exp", "triton.knobs.runtime.interpret",
    }  # fmt: skip
