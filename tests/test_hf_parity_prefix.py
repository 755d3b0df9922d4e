"""Prefix tuning beside Hugging Face peft on whole models of every family: the start bit for bit, outputs, gradients,
files, loading. peft puts the prefix in the cache; here it is inside attention, and the numbers are the same."""

import copy

import pytest
import torch

from tests.models import batch, tiny
from tests.peft_pair import (
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_start,
    randomise,
    result,
)
from tests.prefix_pair import (
    EVERY,
    SEQ2SEQ,
    assert_same_prefix_step,
    padded_left,
    prefix_pair,
    takes_positions,
    task_of,
    with_positions,
)


def bound_of(family: str) -> float:
    return 1e-5 if family.endswith("t5") else 1e-6


@pytest.mark.parametrize("family", EVERY)
def test_a_family_is_as_in_peft(family, tmp_path):
    task, bound = task_of(family), bound_of(family)
    hf, ours = prefix_pair(family)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    inputs = batch(task)
    assert_same_prefix_step(hf, ours, inputs, bound)
    if family not in SEQ2SEQ:
        assert_same_prefix_step(hf, ours, padded_left(inputs), bound)
    if takes_positions(ours):
        assert_same_prefix_step(hf, ours, with_positions(inputs), bound)
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, lambda: tiny(family, task), inputs, tmp_path)
