"""Whole models on the Triton kernels, in the interpreter: what each family's attention hands to the op (masks, windows,
biases, sinks, scales, caches) arrives in the kernels. Beside Hugging Face peft, as on the torch path."""

import pytest
import torch

import fastpeft
from tests.models import batch
from tests.peft_pair import randomise
from tests.prefix_pair import assert_same_prefix_step, padded_left, prefix_pair, task_of
from tests.test_hf_parity_adaption_prompt import open_gates
from tests.test_hf_parity_adaption_prompt import pair as gated_pair
from tests.test_prefix_generation import generate, pair, prompts
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("symmetric_products")]


def bound_of(family: str) -> float:
    return 1e-5 if family.endswith("t5") else 2e-6


# Every way in which an attention hands something to the op; families that only differ elsewhere are left to the torch
# path, which tests/test_hf_parity_prefix.py runs on all of them.
KINDS = (
    "llama", "mistral", "mistral-wide", "gemma2", "gemma3", "gpt_oss", "cohere2", "glm", "gpt2", "gpt_bigcode",
    "gpt_neox", "gptj", "gpt_neo", "codegen", "opt", "bloom", "falcon", "falcon-alibi", "falcon-mq", "falcon-new",
    "mpt", "t5", "bart", "pegasus_x", "bert",
)  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_a_step_is_as_in_peft(family):
    task = task_of(family)
    hf, ours = prefix_pair(family)
    randomise(hf, ours)
    inputs = batch(task) if task == "SEQ_2_SEQ_LM" else padded_left(batch(task))
    with fastpeft.backend("triton"), count_traffic() as traffic:
        assert_same_prefix_step(hf, ours, inputs, bound_of(family))
    assert {"_forward_kernel", "_grad_query_kernel", "_grad_keys_kernel"} <= set(traffic.kernels())


# One of each kind of attention; the prefix has left sliding windows where decoding begins, so none of those.
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", "opt", "bloom", "falcon-alibi", "gptj", "gpt_neo", "t5", "bart"]
)
def test_generated_tokens_are_those_of_peft(family):
    hf, ours = pair(family)
    inputs = prompts()
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 4, "min_new_tokens": 4}
        expected = generate(hf, **inputs, **options)
        with fastpeft.backend("triton"), count_traffic() as traffic:
            assert torch.equal(generate(ours, **inputs, **options), expected)
        assert "_decode_kernel" in traffic.kernels()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_gated_prompts_step_is_as_in_peft(family):
    hf, ours = gated_pair(family, adapter_layers=2)
    randomise(hf, ours)
    open_gates(0.7, hf, ours)
    with fastpeft.backend("triton"), count_traffic() as traffic:
        assert_same_prefix_step(hf, ours, batch("CAUSAL_LM"), 2e-6)
    assert {"_forward_kernel", "_grad_query_kernel", "_grad_keys_kernel"} <= set(traffic.kernels())
