"""What `report` says of a model with a prompt."""

import fastpeft
from tests.models import tiny


def reported(family: str, task: str):
    config = fastpeft.PromptTuningConfig(num_virtual_tokens=4, task_type=task)
    return fastpeft.report(fastpeft.patch(tiny(family, task), config))


def test_the_op_is_named_and_where_it_runs():
    found = reported("llama", "CAUSAL_LM")
    (row,) = found.layers
    assert (row.path, row.kind, row.adapters) == ("model.embed_tokens", "PromptedEmbedding", ("default",))
    assert (row.op, row.backend) == ("prompt_embedding", "torch") and "CPU" in row.reason
    assert "1 x PromptedEmbedding: prompt_embedding on torch" in str(found)


def test_an_embedding_that_scales_has_the_prompt_put_in_front():
    assert [row.op for row in reported("gemma3", "CAUSAL_LM").layers] == ["prepend_prompt"]
    assert {row.kind for row in reported("t5", "SEQ_2_SEQ_LM").layers} == {"PromptedEmbedding"}
