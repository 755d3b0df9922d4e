"""The check-in's step of CUDA tests: what is reported of failing, slow, and missing ones."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.cuda_tests import run_tests
from tests.benchmarks.made_up import made_up_tests


def test_a_failing_test_is_told_in_its_own_words(tmp_path):
    found = run_tests([made_up_tests(tmp_path, 'assert "apples" == "pears"')], tmp_path, 60)
    assert (found["rc"], found["passed"], found["failed"], found["timed_out"]) == (1, 1, 1, False)
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_made_up::test_other")  # pytest puts the folders below its root in front
    assert "'apples' == 'pears'" in failure["text"]


def test_tests_that_take_too_long_are_stopped_and_still_report(tmp_path):
    """Without workers and with two, which wait for the limit side by side."""
    start, limit = time.monotonic(), 12  # within which, on a busy machine, workers start and run a test

    def run(workers: int) -> dict:
        out = tmp_path / f"{workers} workers"
        out.mkdir()
        return run_tests([made_up_tests(out, "time.sleep(200)")], out, limit, workers)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        with ThreadPoolExecutor() as threads:
            both = [*threads.map(run, (0, 2))]
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 4 * limit
    for found in both:
        assert found["timed_out"] and found["passed"] == 1 and found["rc"] != 0, found
        assert found["note"] == f"Stopped after {limit} s: not all of them ran."


def test_tests_are_shared_by_workers(tmp_path):
    found = run_tests([made_up_tests(tmp_path, "assert 1 + 1 == 2")], tmp_path, 60, workers=2)
    assert (found["rc"], found["passed"]) == (0, 2) and "-n 2" in found["command"]


def test_no_test_marked_cuda_and_no_tests_at_all_are_said(tmp_path):
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass\n")
    found = run_tests([tmp_path / "test_plain.py"], tmp_path, 60)
    assert found["rc"] == 5 and found["note"] == "No test is marked cuda."
    assert "does not exist" in run_tests([tmp_path / "nowhere"], tmp_path, 60)["note"]
