"""An op's own Python stays as little as it is: functions entered in a call are the same on every machine, times are
not."""

from benchmarks import overhead


def test_an_op_enters_few_functions_beside_those_of_autograd():
    rows = {name: entered for name, _, _, entered in overhead.measured(calls=1, repeats=1)}
    assert rows["lora_linear"] - rows["a bare Function"] <= 24
    assert rows["a patched layer"] - rows["lora_linear"] <= 34


def test_the_times_are_of_calls(capsys):
    assert overhead.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:]] == ["a bare Function", "lora_linear", "a patched layer"]
    bare, op, layer = (float(line[16:].split()[0]) for line in lines[1:])
    assert 0 < bare < op < layer
