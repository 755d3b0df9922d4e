"""`generate` with a static cache, whose steps transformers compiles: one graph, and the tokens of a dynamic cache."""

import pytest
import torch
from transformers import CompileConfig

from tests.compiled import METHODS, adapted
from tests.models import batch

GRAPHS: list[torch.fx.GraphModule] = []


def collecting(graph, inputs):
    GRAPHS.append(graph)
    return graph.forward


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_give_the_tokens_of_eager_ones(method):
    torch._dynamo.reset()
    GRAPHS.clear()
    model, inputs = adapted(method).eval(), {"input_ids": batch()["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**options)
    static = {**options, "cache_implementation": "static"}
    assert torch.equal(model.generate(**static, disable_compile=True), expected)
    config = CompileConfig(fullgraph=True, backend=collecting, mode=None)
    config._compile_all_devices = True  # which transformers does of itself on a GPU alone
    assert torch.equal(model.generate(**static, compile_config=config), expected)
    assert len(GRAPHS) == 1
    torch._dynamo.reset()
