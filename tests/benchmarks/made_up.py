"""Tests for the check-in to run, which are none of ours."""

TESTS = """
import time
import pytest

@pytest.mark.cuda
def test_right():
    pass

@pytest.mark.cuda
def test_other():
    {body}

def test_not_for_gpus():
    raise RuntimeError("must not be collected")
"""


def made_up_tests(tmp_path, body):
    path = tmp_path / "test_made_up.py"
    path.write_text(TESTS.format(body=body))
    return path
