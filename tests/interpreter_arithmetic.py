"""Arithmetic of blocks in Triton's interpreter by one call of numpy each, which is what it comes to in the end: of two
operands of one type, or of one and a number that the type holds. All else, and every error, is the interpreter's own.

Part of `interpreter_speed`, which installs it.
"""

import numpy as np

# Operator -> the numpy function that the interpreter calls in the end, and whether that returns truth values.
ARITHMETIC = {
    "__add__": (np.add, False),
    "__sub__": (np.subtract, False),
    "__mul__": (np.multiply, False),
    "__lt__": (np.less, True),
    "__le__": (np.less_equal, True),
    "__gt__": (np.greater, True),
    "__ge__": (np.greater_equal, True),
}
REFLECTED = {"__radd__": "__add__", "__rsub__": "__sub__", "__rmul__": "__mul__"}
BITWISE = {"__and__": np.bitwise_and, "__or__": np.bitwise_or, "__xor__": np.bitwise_xor}


def quick_operators(slow: dict) -> dict:
    """Name -> function in the place of the operator of `triton.language.tensor` in `slow`, which serves the rest."""
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    tensor, block_type, constexpr = core.tensor, core.block_type, core.constexpr
    integers = {core.int32: (-(2**31), 2**31), core.int64: (-(2**63), 2**63), core.uint32: (0, 2**32)}
    ranges = {dtype.name: limits for dtype, limits in integers.items()}
    numpy_types = {"int32": np.int32, "int64": np.int64, "uint32": np.uint32}
    numpy_types |= {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}

    def handle(data, dtype):
        made = TensorHandle.__new__(TensorHandle)
        made.data, made.dtype, made.attr = data, dtype, {}
        return made

    def number(value, name):
        """In numpy's type of this name, or None where Triton would take or refuse it in another way."""
        kind = type(value)
        if kind is int and name in ranges:
            low, high = ranges[name]
            return np.array([value], numpy_types[name]) if low <= value < high else None
        return np.array([value], numpy_types[name]) if kind in (int, float) and name not in ranges else None

    joined = {}

    def of_both(left, right):
        """The type of a result of both, of the left one's numbers; None where their shapes do not suit each other."""
        a, b = left.type, right.type
        if not b.is_block() or (a.is_block() and a.shape is b.shape):
            return a
        if not a.is_block():
            return b
        key = id(a.shape), id(b.shape), a.scalar.name
        if key not in joined:
            joined[key] = _joined(a, b), a.shape, b.shape  # which are kept, and their ids with them
        return joined[key][0]

    def _joined(a, b):
        first, second = a.shape.values, b.shape.values
        if len(first) != len(second) or any(m != n and 1 not in (m, n) for m, n in zip(first, second, strict=True)):
            return None
        return block_type(a.scalar, list(map(max, first, second)))

    def widened(integers):
        """In int64, which Triton takes int32 and int64 to."""
        if integers.dtype is core.int64:
            return integers
        kind = integers.type.with_element_ty(core.int64) if integers.type.is_block() else core.int64
        return tensor(handle(integers.handle.data.astype(np.int64), core.int64), kind)

    def operands(one, other):
        """(the numbers of both, the result's type), or None where that is not plain."""
        name = one.dtype.name
        if name not in numpy_types or (builder.options.sanitize_overflow and name in ranges):
            return None
        if type(other) is tensor:
            if other.dtype is not one.dtype:
                if {name, other.dtype.name} != {"int32", "int64"}:
                    return None
                one, other = widened(one), widened(other)
            kind = of_both(one, other)
            return kind and (one.handle.data, other.handle.data, kind, one.handle.dtype.scalar)
        value = number(other.value if type(other) is constexpr else other, name)
        return None if value is None else (one.handle.data, value, one.type, one.handle.dtype.scalar)

    def arithmetic(name, function, compares):
        rest = slow[name]

        def quick(self, other, **options):
            found = operands(self, other)
            if found is None:
                return rest(self, other, **options)
            left, right, kind, dtype = found
            kind = kind.with_element_ty(core.int1) if compares else kind
            return tensor(handle(function(left, right), dtype), kind)

        return quick

    def reflected(name, function):
        rest = slow[name]

        def quick(self, other, **options):
            found = None if type(other) is tensor else operands(self, other)
            if found is None:
                return rest(self, other, **options)
            left, right, kind, dtype = found
            return tensor(handle(function(right, left), dtype), kind)

        return quick

    def bitwise(name, function):
        rest = slow[name]

        def quick(self, other, **options):
            if self.dtype.name == "int1" and type(other) is tensor and other.dtype is self.dtype:
                left, right, kind = self.handle.data, other.handle.data, of_both(self, other)
                plain = kind and left.dtype == right.dtype == np.bool_
                found = (left, right, kind, self.handle.dtype.scalar) if plain else None
            else:
                found = operands(self, other) if self.dtype.name in ranges else None
            if found is None:
                return rest(self, other, **options)
            left, right, kind, dtype = found
            return tensor(handle(function(left, right), dtype), kind)

        return quick

    def add(numbers):
        rest = slow["__add__"]

        def quick(self, other, **options):
            """A pointer and signed integers, or numbers."""
            if not self.dtype.is_ptr():
                return numbers(self, other, **options)
            kind = of_both(self, other) if type(other) is tensor and other.dtype.name in ("int32", "int64") else None
            if kind is None:
                return rest(self, other, **options)
            if not self.type.is_block() and kind.is_block():
                kind = kind.with_element_ty(self.type)
            return tensor(builder.create_addptr(self.handle, other.handle), kind)

        return quick

    def getitem(rest):
        expanded = {}

        def quick(self, places, **options):
            """New dimensions of size one."""
            plain = type(places) is tuple and self.type.is_block()
            if not plain or not all(each is None or each == slice(None) for each in places):
                return rest(self, places, **options)
            if sum(each is not None for each in places) != len(self.type.shape):
                return rest(self, places, **options)
            key = id(self.type.shape), self.type.scalar.name, *(each is None for each in places)
            data = self.handle.data[places]
            if key not in expanded:
                expanded[key] = block_type(self.type.scalar, list(data.shape)), self.type.shape
            return tensor(handle(data, self.handle.dtype.scalar), expanded[key][0])

        return quick

    quick = {name: arithmetic(name, *found) for name, found in ARITHMETIC.items()}
    quick |= {name: reflected(name, ARITHMETIC[straight][0]) for name, straight in REFLECTED.items()}
    quick |= {name: bitwise(name, function) for name, function in BITWISE.items()}
    return quick | {"__add__": add(quick["__add__"]), "__getitem__": getitem(slow["__getitem__"])}
