"""Programs of a launch that do what one before them did, played back: the calls of numpy and of the interpreter's
builder that are left of a kernel when all that Triton's language makes of it in Python has been worked out once.

The first program of a kernel with these constants and types is interpreted, and written down call by call: a `Step`
reads places of a list of values and writes one. What hangs on nothing but constants is kept as its result; what hangs
on arguments alone is done once a launch. Where Python asks a tensor for a number or a truth value, as loops and
branches do, the steps branch by the answer; a program with an answer that was not heard before is interpreted from its
beginning, is given what has been computed, loaded and stored already, and goes on from there.

Part of `interpreter_speed`, which installs it. Whatever computes on a tensor's numbers is a method of the builder or
goes through `computed`, and whatever decides by them through `asked`. A launch with descriptors is interpreted as ever.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from triton.language import core
from triton.runtime.interpreter import InterpretedFunction, TensorDescHandle, TensorHandle
from triton.runtime.interpreter import interpreter_builder as builder

CONSTANT, LAUNCH, PROGRAM = range(3)  # what a value hangs on
EFFECTS = ("create_load", "create_store", "create_masked", "create_atomic", "create_get_", "create_descriptor")
EFFECTS += ("create_print", "create_assert", "create_assume", "create_barrier")
NAMES = [name for name in dir(builder) if name.startswith("create_")]
PLAIN = (int, float, str, type(None), core.dtype, InterpretedFunction, types.FunctionType)
RECORDINGS = 100  # of one kernel's programs, after which it is interpreted
KEPT = 100  # tapes, those that were asked for last
QUESTION = object()

active = None  # the `Recorder` of the program that is being interpreted
_tapes: dict = {}


class Step(NamedTuple):
    """values[into] = function(values at `read`), which gives one value `alone`, or several, or is None for none."""

    function: Callable
    read: itemgetter | None
    alone: bool
    into: int


@dataclass
class Segment:
    """What is done up to the next question, or to the end."""

    setup: list[Step] = field(default_factory=list)  # once a launch
    steps: list[Step] = field(default_factory=list)
    returned: list = field(default_factory=list)  # of every call (place, type of a handle), or lists of both; QUESTION
    question: tuple[Callable, int] | None = None
    following: dict = field(default_factory=dict)  # segments by the answer
    whole: bool = False


class Tape:
    """What the programs of one kernel do. `values`: the constants, by place; the first places are arguments."""

    def __init__(self, arguments: int):
        self.values, self.levels = [None] * arguments, [LAUNCH] * arguments
        self.start, self.recordings, self.usable = Segment(), 0, True


class Recorder:
    """Writes down a program's calls from `segment` on, after giving it what those before returned."""

    def __init__(self, tape: Tape, values: list, segment: Segment, returned: list):
        self.tape, self.values, self.segment, self.returned = tape, values, segment, returned[::-1]
        self.places = {id(value): place for place, value in enumerate(values) if isinstance(value, np.ndarray)}
        self.recorded = [segment]
        self.inside = False  # of a call that is one step, or of what cannot be one
        self.lost = False

    def lose(self) -> None:
        """From here on the program is interpreted, and none like it is played back."""
        self.inside = self.lost = True

    def computed(self, function: Callable, given: tuple):
        if self.inside:
            return function(*given)
        if self.returned:
            return self._value(self.returned.pop()[0])
        result = function(*given)
        self._note(function, given, result)
        return result

    def called(self, name: str, method: Callable, given: tuple, named: dict):
        """What the builder's method returns: a handle, several, or None."""
        if self.inside:
            return method(*given, **named)
        if self.returned:
            place, kind = self.returned.pop()
            return _handles(self._value(place), kind)
        if any(map(_hides_handles, [*given, *named.values()])):
            self.lose()
            return method(*given, **named)
        self.inside = True
        result = method(*given, **named)
        self.inside = False
        arrays = [each.data for each in given if isinstance(each, TensorHandle)]
        self._note(_of_arrays(name, given, named), arrays, _arrays(result), _types(result), name.startswith(EFFECTS))
        return result

    def asked(self, answer: Callable, data: np.ndarray):
        place = self.places.get(id(data))
        if self.inside or place is None or self.tape.levels[place] == CONSTANT:
            return answer(data)
        heard = answer(data)
        if self.returned:
            self.returned.pop()
        else:
            self.segment.returned.append((QUESTION, None))
            self.segment.question, self.segment.whole = (answer, place), True
            self.segment.following[heard] = self.segment = Segment()
            self.recorded.append(self.segment)
        return heard

    def _value(self, place):
        return tuple(self.values[each] for each in place) if isinstance(place, list) else self.values[place]

    def _note(self, function, given, result, kind=None, effects=False) -> None:
        place = self._step(function, tuple(map(self._place, given)), result, effects)
        if isinstance(result, tuple):
            place = [self._step(itemgetter(number), (place,), each) for number, each in enumerate(result)]
        self.segment.returned.append((place, kind))

    def _step(self, function, read: tuple[int, ...], result, effects=False) -> int:
        level = PROGRAM if effects else max((self.tape.levels[place] for place in read), default=CONSTANT)
        into = self._new(result, level)
        if level != CONSTANT:
            steps = self.segment.setup if level == LAUNCH else self.segment.steps
            steps.append(Step(function, itemgetter(*read) if read else None, len(read) == 1, into))
        return into

    def _place(self, value) -> int:
        if isinstance(value, np.ndarray):
            if (place := self.places.get(id(value))) is not None:
                return place
            if value.size > 1 or value.base is not None:  # made from others in a way that nobody has seen
                self.lose()
        return self._new(value, CONSTANT)

    def _new(self, value, level: int) -> int:
        place = len(self.values)
        self.values.append(value)
        self.tape.values.append(value if level == CONSTANT else None)
        self.tape.levels.append(level)
        if isinstance(value, np.ndarray):
            self.places[id(value)] = place
        elif level != CONSTANT and value is not None and not isinstance(value, tuple):
            self.lose()  # which nobody could find again by what it is
        return place


def _handle(data, dtype) -> TensorHandle:
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    return handle


def _handles(data, kind):
    if isinstance(kind, tuple):
        return tuple(map(_handle, data, kind))
    return None if kind is None else _handle(data, kind)


def _arrays(result):
    return tuple(each.data for each in result) if isinstance(result, tuple) else getattr(result, "data", None)


def _types(result):
    return tuple(each.dtype for each in result) if isinstance(result, tuple) else getattr(result, "dtype", None)


def _hides_handles(value) -> bool:
    """Whether it has handles inside, or is one that was given by name: of a descriptor."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(each, TensorHandle) or _hides_handles(each) for each in value)
    return isinstance(value, TensorDescHandle)


def _of_arrays(name: str, given: tuple, named: dict) -> Callable:
    """The builder's method, which is looked up whenever it is called, as a function of the handles' arrays."""
    kinds = [each.dtype if isinstance(each, TensorHandle) else None for each in given]
    if None not in kinds and not named and len(kinds) == 2:
        first, second = kinds
        return lambda a, b: _arrays(getattr(builder, name)(_handle(a, first), _handle(b, second)))
    rest = [None if isinstance(each, TensorHandle) else each for each in given]

    def call(*arrays):
        left = iter(arrays)
        filled = [each if kind is None else _handle(next(left), kind) for each, kind in zip(rest, kinds, strict=True)]
        return _arrays(getattr(builder, name)(*filled, **named))

    return call


def truth(data: np.ndarray) -> bool:
    """What `if` takes a tensor for."""
    return bool(data) if data.size == 1 else True


def number(data: np.ndarray) -> int:
    """What `range` takes a tensor for."""
    return int(data.squeeze())


def computed(function: Callable, *given):
    """function(*given), an array or a tuple of them, of arrays and of what hangs on none."""
    return function(*given) if active is None else active.computed(function, given)


def asked(answer: Callable, data: np.ndarray):
    """answer(data), by which what follows may go one way or another."""
    return answer(data) if active is None else active.asked(answer, data)


def lose() -> None:
    """What comes now is not played back."""
    if active is not None:
        active.lose()


_signature = functools.cache(inspect.signature)


class Player:
    """A kernel for one launch, called as it is for each program."""

    def __init__(self, fn):
        self.fn, self.tape, self.begun = fn, None, False
        self.values, self.ready = [], set()
        for name in ("__name__", "__globals__", "__annotations__", "__module__"):
            setattr(self, name, getattr(fn, name))
        self.__signature__ = _signature(fn)

    def __call__(self, **arguments) -> None:
        if not self.begun:
            self._begin(arguments)
        if self.tape is None or not self.tape.usable:
            self.fn(**arguments)
            return
        segment, returned = self.tape.start, []
        while segment.whole:
            self._do(segment)
            returned += segment.returned
            if segment.question is None:
                return
            answer, place = segment.question
            segment = segment.following.setdefault(answer(self.values[place]), Segment())
        self._record(arguments, segment, returned)

    def _begin(self, arguments: dict) -> None:
        self.begun, key = True, _key(arguments.values())
        if key is None:
            return
        inputs, key = list(_inputs(arguments.values())), (self.fn, builder.options, key)
        names, tape = _tapes.pop(key, ((), None))
        if tape is None or any(space.get(name) is not value for space, name, value in names):
            names, tape = _names(self.fn), Tape(len(inputs))
        _tapes[key] = names, tape
        if len(_tapes) > KEPT:
            del _tapes[next(iter(_tapes))]
        self.tape, self.values = tape, inputs

    def _do(self, segment: Segment) -> None:
        values = self.values
        values += self.tape.values[len(values) :]
        if id(segment) not in self.ready:
            self.ready.add(id(segment))
            _play(segment.setup, values)
        _play(segment.steps, values)

    def _record(self, arguments: dict, segment: Segment, returned: list) -> None:
        global active
        tape = self.tape
        self.values += tape.values[len(self.values) :]
        tape.recordings += 1
        tape.usable = False  # should it raise
        recorder = active = Recorder(tape, self.values, segment, returned)
        methods = {name: getattr(builder, name) for name in NAMES}
        own = {name: method for name, method in methods.items() if name in vars(builder)}
        vars(builder).update({name: _recorded(name, method) for name, method in methods.items()})
        try:
            self.fn(**arguments)
        finally:
            active = None
            for name in NAMES:
                delattr(builder, name)
            vars(builder).update(own)
        recorder.segment.whole = True
        tape.usable = not recorder.lost and tape.recordings < RECORDINGS
        self.ready.update(map(id, recorder.recorded))


def _recorded(name: str, method: Callable) -> Callable:
    return lambda *given, **named: active.called(name, method, given, named)


def _play(steps: list[Step], values: list) -> None:
    for function, read, alone, into in steps:
        if alone:
            values[into] = function(read(values))
        else:
            values[into] = function(*read(values)) if read else function()


def _inputs(arguments) -> Iterator[np.ndarray]:
    """The arrays of arguments that are tensors, of tuples too."""
    for each in arguments:
        if isinstance(each, core.tensor):
            yield each.handle.data
        elif isinstance(each, tuple):
            yield from _inputs(each)


def _key(arguments) -> tuple | None:
    """The types of tensors and the values of all else, or None where there is something that no tape knows."""
    key = []
    for each in arguments:
        each = each.value if isinstance(each, core.constexpr) else each
        if isinstance(each, core.tensor):
            key.append(str(each.type))
        elif isinstance(each, tuple):
            key.append(_key(each))
        else:
            value = each.hex() if isinstance(each, float) else each  # -0.0 is not 0.0
            key.append((type(each), value) if isinstance(each, PLAIN) else None)
    return None if None in key else tuple(key)


def _names(function) -> list[tuple[dict, str, object]]:
    """(namespace, name, value) of all that a kernel and what it calls look up, but for Triton's own."""
    found, waiting, seen = [], [function], set()
    while waiting:
        each = waiting.pop()
        each = each.fn if isinstance(each, InterpretedFunction) else each
        if not isinstance(each, types.FunctionType) or id(each) in seen or each.__module__.startswith("triton"):
            continue
        seen.add(id(each))
        names = set(_names_in(each.__code__))
        modules = [value for name in names if isinstance(value := each.__globals__.get(name), types.ModuleType)]
        ours = [vars(module) for module in modules if not module.__name__.startswith(("triton", "numpy"))]
        for space in (each.__globals__, *ours):
            values = [(space, name, space[name]) for name in names if name in space]
            found += values
            waiting += [value for *_, value in values]
    return found


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
