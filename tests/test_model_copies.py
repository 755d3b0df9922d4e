"""The tiny models that tests get are what copy.deepcopy makes of one, and share nothing with each other."""

import copy

import pytest
import torch

from tests.model_copies import Original
from tests.models import FAMILIES, MORE_FAMILIES, _built, snapshot, tiny
from tests.prefix_pair import task_of


def shape_of(model):
    """All but objects' identities: modules and their attributes; tensors with their values, and which are tied."""
    seen = snapshot(model)
    modules = {
        name: (kind, children, [*attributes]) for name, (_, kind, children, attributes) in seen["modules"].items()
    }
    first = {}
    tensors = {
        name: (*each[1:4], first.setdefault(each[0], name), each[5] if each[5] is None else each[5].tolist())
        for name, each in seen["tensors"].items()
    }
    return modules, tensors, model.config.to_dict()


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_copy_is_a_deepcopy_s(family):
    task = task_of(family)
    assert shape_of(tiny(family, task)) == shape_of(copy.deepcopy(_built(family, task)))


def test_copies_share_no_memory():
    first, second = tiny("t5", "SEQ_2_SEQ_LM"), tiny("t5", "SEQ_2_SEQ_LM")
    pointers = [{each.data_ptr() for each in model.state_dict().values()} for model in (first, second)]
    assert pointers[0].isdisjoint(pointers[1])
    assert first.shared.weight is first.encoder.embed_tokens.weight and first.config is not second.config
    assert {id(module) for module in first.modules()}.isdisjoint(map(id, second.modules()))


def test_what_shares_memory_is_refused():
    module = torch.nn.Linear(4, 2)
    module.register_buffer("first", module.weight.detach()[0])
    with pytest.raises(AssertionError, match="a view of another tensor"):
        Original(module)
