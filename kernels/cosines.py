"""Inner products in float32, sixteen lanes at a time, in LLVM's own language, for compiled code to call.

As in `kernels.vectors`: addresses, nothing is checked, and the digest rule. For many products with the same sixteen
rows, these lie with their dimensions side by side, ``float32[dim, 16]``: a lane is a row, and no sum crosses lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

_I1, _I32, _I64 = (ir.IntType(bits) for bits in (1, 32, 64))
_F32 = ir.FloatType()
_FLOATS, _INTS, _FLAGS = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, _I1))
_SUMS, _AT_ONCE = 8, 4
"""Sums that are taken side by side, since one alone waits for itself, and of how many others where there are."""


@intrinsic
def inner_product(typing_context: Any, one: Any, other: Any, sixteens: Any) -> Any:
    """Of float32[16·sixteens] at two int64 addresses, as float32, in an order of its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, other, sixteens = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        with cgutils.for_range(builder, sixteens) as loop:
            here = builder.mul(loop.index, _I64(4 * LANES))
            pair = (_load(builder, builder.add(address, here), 0, _FLOATS) for address in (one, other))
            builder.store(builder.call(fused, [*pair, builder.load(total)]), total)
        lanes = builder.load(total)
        for distance in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(_I32, LANES), [lane ^ distance for lane in range(LANES)])
            lanes = builder.fadd(lanes, builder.shuffle_vector(lanes, lanes, order))
        return builder.extract_element(lanes, _I32(0))

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def lay_side_by_side(typing_context: Any, rows: Any, out: Any, sixteens: Any) -> Any:
    """Writes 16·sixteens dimensions of sixteen rows to float32[16·sixteens, 16] at address ``out``.

    rows: address of int64[16], those of float32 rows. All arguments are int64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, out, sixteens = arguments
        with cgutils.for_range(builder, sixteens) as loop:
            here = builder.mul(loop.index, _I64(4 * LANES))
            block = [
                _load(builder, builder.add(_load(builder, rows, 8 * i, _I64, align=8), here), 0, _FLOATS)
                for i in range(LANES)
            ]
            to = builder.add(out, builder.mul(loop.index, _I64(4 * LANES * LANES)))
            for i, lanes in enumerate(_transposed(builder, block)):
                builder.store(lanes, _pointer(builder, to, 4 * LANES * i, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def meet(
    typing_context: Any, rows: Any, dim: Any, others: Any, first: Any, last: Any, closest: Any, second: Any, which: Any,
) -> Any:  # fmt: skip
    """Takes ``others[first:last]`` into what is known of sixteen rows' closest.

    All arguments are int64. rows: address of float32[dim, 16]; dim: a multiple of 8. others: address of
    float32[..., dim]. closest, second float32[16], which int32[16] at addresses: greatest inner product so far, the
    second greatest, and whose the greatest is. A product that is no number changes nothing.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, dim, others, first, last, closest, second, which = arguments
        most, next_most = (
            cgutils.alloca_once_value(builder, _load(builder, at, 0, _FLOATS)) for at in (closest, second)
        )
        whose = cgutils.alloca_once_value(builder, _load(builder, which, 0, _INTS))
        row_bytes = builder.mul(dim, _I64(4))
        many = builder.add(first, builder.and_(builder.sub(last, first), _I64(-_AT_ONCE)))
        for begin, end, count in ((first, many, _AT_ONCE), (many, last, 1)):
            with cgutils.for_range_slice(builder, begin, end, _I64(count)) as (j, _):
                other = builder.add(others, builder.mul(j, row_bytes))
                for i, cosine in enumerate(_cosines(builder, rows, dim, other, row_bytes, count)):
                    known, known_next = builder.load(most), builder.load(next_most)
                    better = builder.fcmp_ordered(">", cosine, known)
                    between = builder.fcmp_ordered(">", cosine, known_next)
                    builder.store(builder.select(better, known, builder.select(between, cosine, known_next)), next_most)
                    builder.store(builder.select(better, cosine, known), most)
                    mine = _spread(builder, builder.trunc(builder.add(j, _I64(i)), _I32))
                    builder.store(builder.select(better, mine, builder.load(whose)), whose)
        for at, of in ((closest, most), (second, next_most)):
            builder.store(builder.load(of), _pointer(builder, at, 0, _FLOATS), align=4)
        builder.store(builder.load(whose), _pointer(builder, which, 0, _INTS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def worth_now(typing_context: Any, worth: Any, closest: Any, weight: Any, out: Any) -> Any:
    """Writes ``worth − weight·closest`` of sixteen to ``out``; returns the greatest that is a number, else -inf.

    worth, closest, out: int64, addresses of float32[16]; weight: float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        worth, closest, weight, out = arguments
        lost = builder.fmul(_spread(builder, weight), _load(builder, closest, 0, _FLOATS))
        now = builder.fsub(_load(builder, worth, 0, _FLOATS), lost)
        builder.store(now, _pointer(builder, out, 0, _FLOATS), align=4)
        nothing = ir.Constant(_FLOATS, [float("-inf")] * LANES)
        numbers = builder.select(builder.fcmp_ordered("ord", now, now), now, nothing)
        kind = ir.FunctionType(_F32, [_FLOATS])
        greatest = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return builder.call(greatest, [numbers], fastmath=("nnan",))

    return types.float32(types.int64, types.int64, types.float32, types.int64), generate


@intrinsic
def at_least(typing_context: Any, values: Any, least: Any) -> Any:
    """Which of sixteen float32 at address ``values`` are at least ``least``, as bits of a uint64; NaN is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, least = arguments
        reached = builder.fcmp_ordered(">=", _load(builder, values, 0, _FLOATS), _spread(builder, least))
        return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), _I64)

    return types.uint64(types.int64, types.float32), generate


def _cosines(builder: Any, rows: Any, dim: Any, other: Any, row_bytes: Any, count: int) -> list[Any]:
    """<16 x float>[count]: inner products of sixteen rows with as many others."""
    sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(_SUMS // count)] for _ in range(count)]
    for of_one in sums:
        for total in of_one:
            builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
    fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    with cgutils.for_range(builder, builder.udiv(dim, _I64(_SUMS // count))) as loop:
        lanes_at = builder.add(rows, builder.mul(loop.index, _I64(4 * LANES * (_SUMS // count))))
        value_at = builder.add(other, builder.mul(loop.index, _I64(4 * (_SUMS // count))))
        for d in range(_SUMS // count):
            lanes = _load(builder, lanes_at, 4 * LANES * d, _FLOATS)
            for i in range(count):
                at = builder.add(value_at, builder.mul(row_bytes, _I64(i)))
                value = _spread(builder, _load(builder, at, 4 * d, _F32))
                builder.store(builder.call(fused, [lanes, value, builder.load(sums[i][d])]), sums[i][d])
    found = []
    for of_one in sums:
        parts = [builder.load(total) for total in of_one]
        while len(parts) > 1:
            parts = [builder.fadd(one, two) for one, two in zip(parts[::2], parts[1::2], strict=True)]
        found.append(parts[0])
    return found


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen with rows and lanes exchanged: blocks of 8, then of 4, 2 and 1."""
    for distance in (8, 4, 2, 1):
        upper = [lane if not lane & distance else LANES + (lane ^ distance) for lane in range(LANES)]
        lower = [lane | distance if not lane & distance else LANES + lane for lane in range(LANES)]
        mixed = list(rows)
        for i in range(LANES):
            if not i & distance:
                pair = rows[i], rows[i | distance]
                for row, lanes in ((i, upper), (i | distance, lower)):
                    order = ir.Constant(ir.VectorType(_I32, LANES), lanes)
                    mixed[row] = builder.shuffle_vector(*pair, order)
        rows = mixed
    return rows


def _pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any, align: int = 4) -> Any:
    return builder.load(_pointer(builder, address, offset, kind), align=align)


def _spread(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _I32(0)), nothing, lanes)
