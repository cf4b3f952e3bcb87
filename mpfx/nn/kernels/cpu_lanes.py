"""Vector instructions for numba: what its loops are not compiled to on their own.

Written in LLVM's own terms, for lanes that are rows of a weight; memory is given by addresses. What a processor has
instructions of its own for is chosen by the features that numba compiles for, which its cache on disk is kept by.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from mpfx.nn.layout import RAW_BITS, WIDTHS
from mpfx.nn.planes import PLANES
from mpfx.nn.scales import FACTORS

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))

BYTES = {"+avx512f", "+avx512bw", "+avx512vnni"} <= FEATURES
"""Whether one instruction multiplies four bytes of every lane: activations are halves of 16 bits then."""

MOVES = BYTES and {"+avx512vl", "+avx512vbmi2"} <= FEATURES
"""Whether one instruction moves bytes to where the bits of a mask are."""

LANES = 16 if BYTES else 8
"""Rows of a weight that are computed at once."""

PAIRS = 16
"""Words that the activations of one segment are, two for every four channels."""

RECORD = PAIRS + 2
"""Words of one segment of one row of activations: these, what an integer is worth, and the integers' sum."""

TILE = 1024
"""Most rows of a weight that are computed at once."""

STRIDE = TILE + 16
"""From word to word, or sum to sum, of all of them: no power of two, or those of a row would share a cache set."""

COUNT = 4
"""Rows of activations that are multiplied together, if there is more than one."""

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_EIGHT = ir.VectorType(_INT, 8)
_ROW = 4 * LANES  # bytes


def _declared(builder: Any, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]


def _long(value: int) -> ir.Constant:
    return ir.Constant(_LONG, value)


def _splat(value: int) -> ir.Constant:
    signed = value - (1 << 32) if value >= 1 << 31 else value
    return ir.Constant(_INTS, [signed] * LANES)


def _load(builder: Any, address: Any, kind: ir.Type, offset: int = 0) -> Any:
    place = builder.add(address, _long(offset)) if offset else address
    return builder.load(builder.inttoptr(place, ir.PointerType(kind)), align=1 if kind == _LONG else 4)


def _store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, ir.PointerType(value.type)), align=align)


def _broadcast(builder: Any, value: Any, lanes: int = LANES) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))


@contextmanager
def _groups(builder: Any, count: Any) -> Iterator[Any]:
    """A loop over groups of lanes, with the byte that a group starts at."""
    with cgutils.for_range(builder, count) as loop:
        yield builder.mul(loop.index, _long(_ROW))


def _shift(builder: Any, word: Any, right: int) -> Any:
    if right == 0:
        return word
    return builder.lshr(word, _splat(right)) if right > 0 else builder.shl(word, _splat(-right))


def _of_bytes(builder: Any, address: Any, start: Any) -> Any:
    """Bytes for the lanes that start at a byte of words, as integers."""
    place = builder.add(address, builder.lshr(start, _long(2)))
    kind = ir.VectorType(ir.IntType(8), LANES)
    return builder.zext(builder.load(builder.inttoptr(place, ir.PointerType(kind)), align=1), _INTS)


def _quads(builder: Any, words: Any, stride: Any, bits: int) -> Iterator[Any]:
    """The codes of a segment, four bytes of every lane at a time; of raw ones, first all low bytes, then all high."""
    loaded = [_load(builder, builder.add(words, builder.mul(stride, _long(k))), _INTS) for k in range(bits)]
    if bits == RAW_BITS:
        yield from loaded
        return
    _prefetch(builder, words, stride, bits)
    for quad in range(8):
        low = word = 0
        code = _splat(0)
        for size in PLANES[bits]:
            quads = 8 // size
            moved = _shift(builder, loaded[word + quad // quads], quad % quads * size - low)
            field = builder.and_(moved, _splat(((1 << size) - 1 << low) * 0x01010101)) if size < 8 else moved
            code = builder.or_(code, field) if low else field
            low, word = low + size, word + size
        yield code


def _prefetch(builder: Any, words: Any, stride: Any, bits: int) -> None:
    """Ask for the same rows of the next segment; where there is none, nothing happens."""
    pointer = ir.PointerType(ir.IntType(8))
    prefetch = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _INT, _INT, _INT)
    for k in range(bits):
        place = builder.add(words, builder.mul(stride, _long(bits + k)))
        builder.call(prefetch, [builder.inttoptr(place, pointer), *(ir.Constant(_INT, v) for v in (0, 3, 1))])


def _multiplied(builder: Any, sums: tuple[Any, Any], codes: Any, x: tuple[Any, Any]) -> tuple[Any, Any]:
    """Add products of four codes and activations of every lane, which :func:`_total` adds up."""
    if BYTES:
        dot = _declared(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, *[_INTS] * 3)
        return tuple(builder.call(dot, [s, codes, v]) for s, v in zip(sums, x, strict=True))
    halves = _splat(0x00FF00FF)
    pairs = builder.and_(codes, halves), builder.and_(builder.lshr(codes, _splat(8)), halves)
    return tuple(builder.add(s, _dot2(builder, *both)) for s, *both in zip(sums, pairs, x, strict=True))


def _total(builder: Any, sums: tuple[Any, Any]) -> Any:
    return builder.add(builder.shl(sums[0], _splat(8)) if BYTES else sums[0], sums[1])


def _dot2(builder: Any, a: Any, b: Any) -> Any:
    """Products of two signed halves in every lane, added."""
    if "+avx2" in FEATURES:
        halves = ir.VectorType(ir.IntType(16), 2 * LANES)
        multiply = _declared(builder, "llvm.x86.avx2.pmadd.wd", _INTS, halves, halves)
        return builder.call(multiply, [builder.bitcast(v, halves) for v in (a, b)])
    sixteen = _splat(16)
    low = builder.mul(*(builder.ashr(builder.shl(v, sixteen), sixteen) for v in (a, b)))
    return builder.add(low, builder.mul(*(builder.ashr(v, sixteen) for v in (a, b))))


def _of_addresses(emit: Callable[..., None], count: int) -> Any:
    """What numba takes for a function of so many int64 that returns nothing."""

    def generated(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        emit(builder, *arguments)
        return context.get_dummy_value()

    def typed(*_: Any) -> Any:
        return types.void(*[types.int64] * count), generated

    names = [inspect.Parameter(f"a{k}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in range(count + 1)]
    typed.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined] # numba counts them
    return intrinsic(typed)


def _by_width(emits: Mapping[int, Callable[..., None]], count: int) -> Any:
    """What numba takes for a function of a width and so many int64, which does what is to be done for that width."""

    def emit(builder: Any, bits: Any, *arguments: Any) -> None:
        end = builder.append_basic_block()
        switch = builder.switch(bits, end)
        for width, of_width in emits.items():
            block = builder.append_basic_block()
            switch.add_case(_long(width), block)
            builder.position_at_end(block)
            of_width(builder, *arguments)
            builder.branch(end)
        builder.position_at_end(end)

    return _of_addresses(emit, 1 + count)


def _products(bits: int, count: int) -> Callable[..., None]:
    """``f(words, stride, x, zeros, sums, groups)``: codes of one segment less zero points, times activations.

    For ``groups`` of lanes from address ``words`` on (``stride`` bytes from word to word), adds to float32 ``sums``:
    those of ``count`` rows of activations, whose records begin at ``x``. What is summed is integers, exact. Zero points
    are bytes.
    """

    def emit(builder: Any, words: Any, stride: Any, x: Any, zeros: Any, sums: Any, groups: Any) -> None:
        records = [builder.add(x, _long(4 * RECORD * n)) for n in range(count)]
        units = [_broadcast(builder, _load(builder, r, _FLOAT, 4 * PAIRS)) for r in records]
        integers = [_broadcast(builder, _load(builder, r, _INT, 4 * PAIRS + 4)) for r in records]
        with _groups(builder, groups) as start:
            zero = _of_bytes(builder, zeros, start)
            found = [(_splat(0), _splat(0))] * count
            for quad, codes in enumerate(_quads(builder, builder.add(words, start), stride, bits)):
                for n, record in enumerate(records):
                    pair = [_load(builder, record, _INT, 8 * quad + 4 * k) for k in range(2)]
                    found[n] = _multiplied(builder, found[n], codes, tuple(_broadcast(builder, v) for v in pair))
            for n in range(count):
                total = builder.sub(_total(builder, found[n]), builder.mul(zero, integers[n]))
                place = builder.add(builder.add(sums, start), _long(4 * STRIDE * n))
                part = builder.fmul(builder.sitofp(total, _FLOATS), units[n])
                _store(builder, builder.fadd(_load(builder, place, _FLOATS), part), place)

    return emit


add_product: Any = _by_width({bits: _products(bits, 1) for bits in WIDTHS}, 6)
"""``add_product(bits, words, stride, x, zeros, sums, groups)``: of one row of activations, see :func:`_products`."""

add_products: Any = _by_width({bits: _products(bits, COUNT) for bits in WIDTHS}, 6)
"""The same of :data:`COUNT` rows of activations."""


def _values(bits: int) -> Callable[..., None]:
    """``f(words, stride, zeros, scales, out, step, groups)``: weights of a segment, channels ``step`` bytes apart."""

    def emit(builder: Any, words: Any, stride: Any, zeros: Any, scales: Any, out: Any, step: Any, groups: Any) -> None:
        with _groups(builder, groups) as start:
            zero, scale = _of_bytes(builder, zeros, start), _load(builder, builder.add(scales, start), _FLOATS)
            for quad, codes in enumerate(_quads(builder, builder.add(words, start), stride, bits)):
                for k in range(4):
                    code = builder.and_(_shift(builder, codes, 8 * k), _splat(0xFF))
                    value = builder.fmul(builder.sitofp(builder.sub(code, zero), _FLOATS), scale)
                    place = builder.add(out, builder.mul(step, _long(4 * quad + k)))
                    _store(builder, value, builder.add(place, start))

    return emit


write_values: Any = _by_width({bits: _values(bits) for bits in WIDTHS}, 7)
"""``write_values(bits, words, stride, zeros, scales, out, step, groups)``, see :func:`_values`."""


def _scales(builder: Any, codes: Any, rows: Any, bases: Any, out: Any, groups: Any) -> None:
    """The products of :func:`mpfx.nn.scales.scale_values`, in their order."""
    group, step = (_broadcast(builder, _load(builder, bases, _FLOAT, 4 * k)) for k in range(2))
    with _groups(builder, groups) as start:
        code = _of_bytes(builder, codes, start)
        exponent = builder.sub(_splat(127), builder.lshr(code, _splat(2)))
        power = builder.bitcast(builder.shl(exponent, _splat(23)), _FLOATS)
        root = ir.Constant(_FLOATS, [_ROOTS[0]] * LANES)
        for k in range(1, 4):
            found = builder.icmp_unsigned("==", builder.and_(code, _splat(3)), _splat(k))
            root = builder.select(found, ir.Constant(_FLOATS, [_ROOTS[k]] * LANES), root)
        value = builder.fmul(_load(builder, builder.add(rows, start), _FLOATS), group)
        value = builder.fmul(builder.fmul(value, builder.fmul(root, power)), step)
        _store(builder, value, builder.add(out, start))


_ROOTS = tuple(float(np.float32(factor)) for factor in FACTORS[:4])

scales: Any = _of_addresses(_scales, 5)
"""``scales(codes, rows, bases, out, groups)``: what codes, bytes, stand for; at ``bases``, the group's and the step."""


def _finish(builder: Any, sums: Any, scales: Any, y: Any, groups: Any) -> None:
    with _groups(builder, groups) as start:
        total, place = builder.add(sums, start), builder.add(y, start)
        part = builder.fmul(_load(builder, total, _FLOATS), _load(builder, builder.add(scales, start), _FLOATS))
        _store(builder, builder.fadd(_load(builder, place, _FLOATS), part), place)
        _store(builder, ir.Constant(_FLOATS, [0.0] * LANES), total)


finish: Any = _of_addresses(_finish, 4)
"""``finish(sums, scales, y, groups)``: adds sums times scales to ``y``, and sets the sums to zero."""


def _bytes(bits: int) -> Callable[..., None]:
    """``f(words, out, blocks)``: blocks of 32 codes that lie one after another, as bytes."""

    def emit(builder: Any, words: Any, out: Any, blocks: Any) -> None:
        with cgutils.for_range(builder, blocks) as loop:
            place = builder.add(words, builder.mul(loop.index, _long(4 * bits)))
            low, word, code = 0, 0, None
            for size in PLANES[bits][:1] if bits == RAW_BITS else PLANES[bits]:
                loaded = _load(builder, place, ir.VectorType(_INT, size), 4 * word)
                field = _fields(builder, loaded, size)
                moved = builder.shl(field, ir.Constant(_EIGHT, [low] * 8)) if low else field
                code = moved if code is None else builder.or_(code, moved)
                low, word = low + size, word + size
            _store(builder, code, builder.add(out, builder.mul(loop.index, _long(32))))

    return emit


def _fields(builder: Any, words: Any, size: int) -> Any:
    """The codes of the words of a plane, four in each of eight words."""
    if size == 8:
        return words
    indices = [quad * size // 8 for quad in range(8)]
    shifts = [quad % (8 // size) * size for quad in range(8)]
    spread = builder.shuffle_vector(words, words, ir.Constant(_EIGHT, indices))
    moved = builder.lshr(spread, ir.Constant(_EIGHT, shifts))
    return builder.and_(moved, ir.Constant(_EIGHT, [((1 << size) - 1) * 0x01010101] * 8))


write_bytes: Any = _by_width({bits: _bytes(bits) for bits in (*WIDTHS, RAW_BITS)}, 3)
"""``write_bytes(bits, words, out, blocks)``, see :func:`_bytes`; of raw codes, the low bytes."""


def _shifted(_: Any, word: Any, bits: Any) -> Any:
    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.lshr(*arguments)

    return types.int32(types.int32, types.int32), emit


def _pointer(_: Any, address: Any) -> Any:
    def emit(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit


def _taken(_: Any, address: Any, step: Any) -> Any:
    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.PointerType(_LONG))
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), emit


shifted: Any = intrinsic(_shifted)
"""``shifted(word, bits)``: shifted right, in 32 bits; numba on its own computes in 64, which halves the lanes."""

pointer: Any = intrinsic(_pointer)
"""``pointer(address)``: what ``carray`` takes."""

taken: Any = intrinsic(_taken)
"""``taken(address, step)``: the number there, which grows by ``step``, for one thread alone."""


def _moved(_: Any, codes: Any, kept: Any, fills: Any, out: Any, step: Any) -> Any:
    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return _move_rows(builder, *arguments)

    return types.int64(*[types.int64] * 5), emit


def _move_rows(builder: Any, codes: Any, kept: Any, fills: Any, out: Any, step: Any) -> Any:
    two_rows, bits = ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(1), 64)
    expand = _declared(builder, "llvm.x86.avx512.mask.expand.v64i8", two_rows, two_rows, two_rows, bits)
    count = _declared(builder, "llvm.ctpop.i64", _LONG, _LONG)
    masks = cgutils.alloca_once(builder, _INTS)  # type: ignore[no-untyped-call]
    builder.store(_load(builder, kept, _INTS), masks, align=4)
    first, pairs = builder.ptrtoint(masks, _LONG), []
    for row in range(0, LANES, 2):
        mask = _load(builder, first, _LONG, 4 * row)
        source = builder.load(builder.inttoptr(codes, ir.PointerType(two_rows)), align=1)
        low, high = (_broadcast(builder, _load(builder, fills, _INT, 4 * row + k)) for k in (0, 4))
        fill = builder.shuffle_vector(low, high, ir.Constant(_INTS, [*range(8), *range(24, 32)]))
        found = builder.call(expand, [source, builder.bitcast(fill, two_rows), builder.bitcast(mask, bits)])
        pairs.append(builder.bitcast(found, _INTS))
        codes = builder.add(codes, builder.call(count, [mask]))
    for word, lanes in enumerate(_transposed(builder, pairs)):
        _store(builder, lanes, builder.add(out, builder.mul(step, _long(word))))
    return codes


def _transposed(builder: Any, pairs: Sequence[Any]) -> list[Any]:
    """Eight pairs of rows of eight words as eight words of sixteen rows."""
    both, lanes = list(pairs), range(16)
    for step in (1, 2, 4):
        order = [k // 2 + k % 2 * 8 for k in lanes] if step == 4 else lanes  # even rows and odd ones lay apart
        for k in (k for k in range(8) if not k & step):
            first = [i if not i & step else 16 + i - step for i in order]
            second = [i + step if not i & step else 16 + i for i in order]
            both[k], both[k + step] = (
                builder.shuffle_vector(both[k], both[k + step], ir.Constant(_INTS, indices))
                for indices in (first, second)
            )
    return both


moved: Any = intrinsic(_moved)
"""``moved(codes, kept, fills, out, step)``: bytes from ``codes`` on to the channels that ``kept`` has, of 16 rows.

Other channels become what ``fills`` has for their row, four bytes; four channels are a word, words are ``step`` bytes
apart. Returns where the next codes are. Only where :data:`MOVES` holds; reads up to 64 bytes more than there are codes.
"""


def _spread(_: Any, codes: Any, kept: Any) -> Any:
    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        data = _load(builder, arguments[0], _LONG)
        if "+bmi2" in FEATURES:
            deposit = _declared(builder, "llvm.x86.bmi.pdep.64", _LONG, _LONG, _LONG)
            return builder.call(deposit, [data, builder.mul(arguments[1], _long(0xFF))])
        return _deposit(builder, data, arguments[1])

    return types.uint64(types.int64, types.uint64), emit


def _deposit(builder: Any, data: Any, kept: Any) -> Any:
    result, byte = _long(0), _long(0xFF)
    for k in range(8):
        bit = builder.and_(builder.lshr(kept, _long(8 * k)), _long(1))
        value = builder.mul(builder.and_(data, byte), bit)
        result = builder.or_(result, builder.shl(value, _long(8 * k)))
        data = builder.lshr(data, builder.shl(bit, _long(3)))
    return result


spread: Any = intrinsic(_spread)
"""``spread(codes, kept)``: bytes from ``codes`` on, moved in order to the bytes that ``kept`` has.

Every byte of ``kept``, an uint64, is 0 or 1; returns an uint64 with bytes of 0 where it is 0. Reads eight bytes.
"""
