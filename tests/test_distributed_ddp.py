"""Every method under DistributedDataParallel: what several processes train is what one does with the whole batch."""

import pytest

from tests import distributed_fused as fused
from tests import distributed_work as work
from tests.distributed import run

VARIANTS = (
    {},
    {"micro": 2, "gradient_as_bucket_view": True},
    {"checkpointing": "without reentrance"},
    {"checkpointing": "reentrant", "static_graph": True},
)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    cases = [(method, variant) for method in work.METHODS for variant in VARIANTS]
    refused = [(method, {"checkpointing": "reentrant"}) for method in ("prefix", "prefix-projection", "adalora")]
    both = run(fused.under_ddp, 2, tmp_path, cases + refused, timeout=120)
    found = [*zip(*(plain for plain, _ in both), strict=True)]
    for (method, variant), ranks in zip(cases, found, strict=False):
        work.assert_as_alone(method, ranks, variant)
    # The gradient of the first layer alone would be averaged, without a word.
    for ranks in found[len(cases) :]:
        assert all("under DistributedDataParallel: checkpointing with use_reentrant=True" in each for each in ranks)
    for case, each in zip(fused.DDP, zip(*(results for _, results in both), strict=True), strict=True):
        work.assert_as_alone("lora", each, case)


def test_four_processes_train_what_one_does(tmp_path):
    cases = [(method, {}) for method in ("lora-head", "adalora", "prefix", "p-tuning", "adapter")]
    found = run(work.ddp, 4, tmp_path, [*cases, ("lora", {"micro": 2})])
    for (method, variant), ranks in zip([*cases, ("lora", {"micro": 2})], zip(*found, strict=True), strict=True):
        work.assert_as_alone(method, ranks, variant)


def test_a_difference_is_seen(tmp_path):
    """The comparison, on what two processes that do not talk to each other train."""
    (found,) = run(work.ddp, 1, tmp_path, [("lora", {})])
    work.assert_as_alone("lora", found)
    found[0]["losses"][-1] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="lora , rank 0: losses differs by"):
        work.assert_as_alone("lora", found)
    found[0]["losses"][-1] /= 1 + 1e-4
    next(iter(found[0]["parameters"].values())).mul_(1 + 1e-4)
    with pytest.raises(AssertionError, match="lora_A.default.weight differs by"):
        work.assert_as_alone("lora", found)


def test_a_failure_in_one_process_is_that_of_the_test(tmp_path):
    with pytest.raises(AssertionError, match="(?s)rank 1:.*KeyError: 'no such method'"):
        run(fails_in_one, 2, tmp_path)


def fails_in_one(rank: int):
    return work.METHODS["lora" if rank == 0 else "no such method"]
