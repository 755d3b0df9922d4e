"""The step benchmark's model whose projections are one op: what is checked and timed is that, where there is any."""

from benchmarks.step_models import FUSED
from tests.benchmarks.test_bench_step import LORA, PREFIX, found, run
from tests.fused import seen as seen


def test_projections_are_fused_where_there_are_any(seen):
    row = found(run([LORA]), FUSED)
    assert row["status"] == "ok" and row["checked"]["problems"] == []
    assert set(seen) == {2, 3}


def test_what_has_none_is_named():
    row = found(run([PREFIX]), FUSED)
    assert row["status"] == "missing" and row["note"] == "prefix has no projections to fuse"
