"""Vector instructions for numba: what its loops are not compiled to on their own.

Both are written in LLVM's own terms, with one x86 instruction each where the CPU has it.
"""

import itertools
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Rows of a weight that are computed at once."""

_INT = ir.IntType(32)
_LONG = ir.IntType(64)
_VECTOR = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)

_FEATURES = binding.get_host_cpu_features() if platform.machine() in ("x86_64", "AMD64") else {}


def _declared(module: Any, kind: ir.FunctionType, name: str) -> Any:
    return cgutils.get_or_insert_function(module, kind, name)  # type: ignore[no-untyped-call]


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any, target: ir.Type) -> Any:
    """The address of ``array[index]``, as one of ``target``."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(target))


def _dot2(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """``total`` plus the products of two signed halves in every lane."""
    if _FEATURES.get("avx2"):
        kind = ir.FunctionType(_VECTOR, [_HALVES, _HALVES])
        multiply = _declared(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.add(total, builder.call(multiply, [builder.bitcast(v, _HALVES) for v in (a, b)]))
    sixteen = _splat(16)
    low = builder.mul(*(builder.ashr(builder.shl(v, sixteen), sixteen) for v in (a, b)))
    high = builder.mul(*(builder.ashr(v, sixteen) for v in (a, b)))
    return builder.add(total, builder.add(low, high))


def _plane_products(size: int) -> Callable[..., Any]:
    """``products(words, at, stride, pairs, pair, totals, lane, low)``, for planes of ``size`` bits.

    Adds to ``totals[lane : lane + 8]`` what the 32 codes of eight rows, word w of the plane at ``words[at + w *
    stride]``, make with the 16 ``pairs`` of activations from ``pair`` on, times ``2^low``. The pairs are channels 4i
    and 4i + 2, then 4i + 1 and 4i + 3: four codes that are bytes of a word are pairs of halves, and another, shifted.
    """
    quads = 8 // size

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, at, stride, pairs, pair, totals, lane, low = arguments
        kinds, total = signature.args, _splat(0)
        for word in range(size):
            place = builder.add(at, builder.mul(stride, ir.Constant(_LONG, word)))
            codes = builder.load(_at(context, builder, kinds[0], words, place, _VECTOR), align=4)
            for quad, odd in itertools.product(range(quads), range(2)):
                index = builder.add(pair, ir.Constant(_LONG, 2 * (word * quads + quad) + odd))
                x = builder.load(_at(context, builder, kinds[3], pairs, index, _INT))
                moved = builder.lshr(codes, _splat(quad * size + 8 * odd))
                halves = builder.and_(moved, _splat(((1 << size) - 1) * 0x10001))
                total = _dot2(builder, total, halves, _broadcast(builder, x))
        place = _at(context, builder, kinds[5], totals, lane, _VECTOR)
        scaled = builder.shl(total, _broadcast(builder, builder.trunc(low, _INT)))
        builder.store(builder.add(builder.load(place, align=4), scaled), place, align=4)
        return context.get_dummy_value()

    def products(
        _: Any, words: Any, at: Any, stride: Any, pairs: Any, pair: Any, totals: Any, lane: Any, low: Any
    ) -> Any:
        integer = types.int64
        return types.void(words, integer, integer, pairs, integer, totals, integer, integer), emit

    return intrinsic(products)


def _broadcast(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), _splat(0))


products_8, products_4, products_2, products_1 = (_plane_products(size) for size in (8, 4, 2, 1))


def _shifted(_: Any, word: Any, bits: Any) -> Any:
    def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.lshr(*arguments)

    return types.int32(types.int32, types.int32), emit


def _spread(_: Any, source: Any, start: Any, kept: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = builder.load(_at(context, builder, signature.args[0], arguments[0], arguments[1], _LONG), align=1)
        if _FEATURES.get("bmi2"):
            kind = ir.FunctionType(_LONG, [_LONG, _LONG])
            deposit = _declared(builder.module, kind, "llvm.x86.bmi.pdep.64")
            return builder.call(deposit, [data, builder.mul(arguments[2], ir.Constant(_LONG, 0xFF))])
        return _deposit(builder, data, arguments[2])

    return types.uint64(source, types.int64, types.uint64), emit


def _deposit(builder: Any, data: Any, kept: Any) -> Any:
    result, byte = ir.Constant(_LONG, 0), ir.Constant(_LONG, 0xFF)
    for k in range(8):
        bit = builder.and_(builder.lshr(kept, ir.Constant(_LONG, 8 * k)), ir.Constant(_LONG, 1))
        value = builder.mul(builder.and_(data, byte), bit)
        result = builder.or_(result, builder.shl(value, ir.Constant(_LONG, 8 * k)))
        data = builder.lshr(data, builder.shl(bit, ir.Constant(_LONG, 3)))
    return result


shifted: Any = intrinsic(_shifted)
"""``shifted(word, bits)``: shifted right, in 32 bits; numba on its own computes in 64, which halves the lanes."""

spread: Any = intrinsic(_spread)
"""``spread(source, start, kept)``: bytes from ``source[start]`` on, moved in order to the bytes that ``kept`` has.

Every byte of ``kept``, an uint64, is 0 or 1; returns an uint64 with bytes of 0 where it is 0. Reads eight bytes.
"""
