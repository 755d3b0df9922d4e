"""An op's own Python stays as little as it is: functions entered in a call are the same on every machine, times are
not."""

from benchmarks import overhead


def test_an_op_enters_few_functions_beside_those_of_autograd():
    rows = {name: entered for name, *_, entered in overhead.measured(calls=1, repeats=1, cold_calls=1)}
    assert rows["lora_linear"] - rows["a bare Function"] <= 15
    assert rows["a patched layer"] - rows["lora_linear"] <= 30


def test_the_times_are_of_calls(capsys):
    assert overhead.main(calls=300, repeats=7, cold_calls=7) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:]] == ["a bare Function", "lora_linear", "a patched layer"]
    numbers = [list(map(float, line[16:].split())) for line in lines[1:]]
    bare, op, layer = (each[0] for each in numbers)
    assert 0 < bare < op < layer
    assert all(cold > warm > 0 for each in numbers for warm, cold in (each[:3:2], each[1:4:2]))
