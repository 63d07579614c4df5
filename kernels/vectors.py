"""The innermost loops of a search in LLVM's own language, for compiled code to call.

Numba knows no vectors, and LLVM turns neither of these loops into the instructions that they are made for: it is five
times slower on the one and ten times on the other. All functions take addresses (``array.ctypes.data``) and count and
check nothing. Whose address is taken must be an argument of the compiled function: Numba frees a local array when it is
last mentioned. Numba's cache knows a change of the calling file only: so that one names this file's digest, and a test
compares (tests/unit/test_compiled_with.py).

**int8.** Rows lie in groups of sixteen, four dimensions of each row side by side: ``packed int8[G, steps, 16, 4]``.
Queries lie in blocks of eight likewise: ``words uint8[blocks, steps, 8, 4]``, each byte 128 more than its number,
because a CPU with AVX-512 VNNI multiplies unsigned by signed bytes, 64 at once. ``bias int32[G, 16]``, -128 times the
sum of a row, takes that off again. On any other CPU the same vectors are spelled out in plain operations: the same
sums, slowly.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP_ROWS = 16
BLOCK_QUERIES = 8

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_INTS, _FLOATS, _FLAGS = (ir.VectorType(kind, GROUP_ROWS) for kind in (_I32, _F32, _I1))
_LANES, _WIDE_LANES = ir.VectorType(_F32, 8), ir.VectorType(_F64, 8)


def has_int8_dots() -> bool:
    """Whether this CPU has the instruction, and Numba compiles for this CPU."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vnni"))


@intrinsic
def reach_floors(
    typing_context: Any, packed: Any, steps: Any, bias: Any, scale: Any, radius: Any, norm: Any, words: Any,
    factors: Any, floors: Any, bits: Any, bits_stride: Any,
) -> Any:  # fmt: skip
    """Which of two groups' rows may reach the floors of a block's queries.

    All arguments are int64. packed, bias, scale, radius, norm: addresses of the first group's. words, floors
    float32[8], factors float32[2, 8]: addresses of the block's. For query j, the uint32 at address
    ``bits + j·bits_stride`` gets a bit per row, set unless ``scale·dot·factors[0, j] + radius + norm·factors[1, j] <
    floors[j]`` is certain: a value that is no number sets it.
    """
    return types.void(*[types.int64] * 11), _reach(groups=2, queries=BLOCK_QUERIES)


@intrinsic
def reach_floor(
    typing_context: Any, packed: Any, steps: Any, bias: Any, scale: Any, radius: Any, norm: Any, words: Any,
    factors: Any, floors: Any, bits: Any, bits_stride: Any,
) -> Any:  # fmt: skip
    """As `reach_floors`, for four groups and one query of a block, which the last addresses are moved to.

    For query j, words and factors and floors are those of the block plus 4·j; the uint64 at ``bits`` gets the bits.
    """
    return types.void(*[types.int64] * 11), _reach(groups=4, queries=1)


@intrinsic
def approximate_scores(
    typing_context: Any, packed: Any, steps: Any, bias: Any, scale: Any, words: Any, factors: Any, masks: Any,
    out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``scale·dot·factors[0, j]`` of one group's sixteen rows with a block's queries, -inf where masked.

    All arguments are int64, as for `reach_floors`. masks: address of uint16[8], query j's has a bit per row. Query j's
    scores go to the float32[16] at address ``out + j·out_stride``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, steps, bias, scale, words, factors, masks, out, stride = arguments
        dots = _int8_dots(builder, packed, bias, words, steps, groups=1, queries=BLOCK_QUERIES)
        scales = _load(builder, scale, 0, _FLOATS)
        nothing = ir.Constant(_FLOATS, [float("-inf")] * GROUP_ROWS)
        for j in range(BLOCK_QUERIES):
            unit = _spread(builder, _load(builder, factors, 4 * j, _F32))
            scores = builder.fmul(builder.fmul(dots[0][j], scales), unit)
            allowed = builder.bitcast(_load(builder, masks, 2 * j, _I16, align=2), _FLAGS)
            place = builder.add(out, builder.mul(stride, _I64(j)))
            builder.store(builder.select(allowed, scores, nothing), _pointer(builder, place, 0, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


@intrinsic
def canonical_inner(typing_context: Any, query: Any, row: Any, dim: Any) -> Any:
    """The canonical score, float32, of a float64[dim] query with a float32[dim] row; see `kernels.topk`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, row, dim = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(_WIDE_LANES, [0.0] * 8))
        blocks = builder.lshr(dim, _I64(3))
        with cgutils.for_range(builder, blocks) as loop:
            wide = _load(builder, builder.add(query, builder.mul(loop.index, _I64(64))), 0, _WIDE_LANES, align=8)
            narrow = _load(builder, builder.add(row, builder.mul(loop.index, _I64(32))), 0, _LANES)
            products = builder.fmul(wide, builder.fpext(narrow, _WIDE_LANES))
            builder.store(builder.fadd(builder.load(total), products), total)
        done = builder.shl(blocks, _I64(3))
        with cgutils.for_range(builder, builder.sub(dim, done)) as loop:
            at = builder.add(done, loop.index)
            wide = _load(builder, builder.add(query, builder.shl(at, _I64(3))), 0, _F64, align=8)
            narrow = _load(builder, builder.add(row, builder.shl(at, _I64(2))), 0, _F32)
            lane = builder.extract_element(builder.load(total), loop.index)
            lane = builder.fadd(lane, builder.fmul(wide, builder.fpext(narrow, _F64)))
            builder.store(builder.insert_element(builder.load(total), lane, loop.index), total)
        lanes = builder.load(total)
        pairs = builder.fadd(_pick(builder, lanes, [0, 2, 4, 6]), _pick(builder, lanes, [1, 3, 5, 7]))
        halves = builder.fadd(_pick(builder, pairs, [0, 2]), _pick(builder, pairs, [1, 3]))
        whole = builder.fadd(*(builder.extract_element(halves, _I32(i)) for i in range(2)))
        return builder.fptrunc(whole, _F32)

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def lowest_bit(typing_context: Any, word: Any) -> Any:
    """The place, int64, of the lowest bit that is set in a uint64; the word may not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], _I1(1))

    return types.int64(types.uint64), generate


@intrinsic
def prefetch_lines(typing_context: Any, address: Any, count: Any) -> Any:
    """Asks for ``count`` cache lines from ``address``; both int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        with cgutils.for_range(builder, arguments[1]) as loop:
            line = builder.add(arguments[0], builder.mul(loop.index, _I64(64)))
            builder.call(instruction, [_pointer(builder, line, 0, _I8), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def count_reaching(typing_context: Any, values: Any, sixteens: Any, least: Any) -> Any:
    """How many of the float32[16·sixteens] at an address are at least ``least``, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, sixteens, least = arguments
        floor = _spread(builder, least)
        total = cgutils.alloca_once_value(builder, _I64(0))
        with cgutils.for_range(builder, sixteens) as loop:
            here = _load(builder, builder.add(values, builder.mul(loop.index, _I64(4 * GROUP_ROWS))), 0, _FLOATS)
            reached = builder.bitcast(builder.fcmp_ordered(">=", here, floor), _I16)
            builder.store(builder.add(builder.load(total), builder.zext(builder.ctpop(reached), _I64)), total)
        return builder.load(total)

    return types.int64(types.int64, types.int64, types.float32), generate


@intrinsic
def largest_of(typing_context: Any, values: Any, sixteens: Any) -> Any:
    """The largest of the float32[16·sixteens] at an address; -inf if there is none. None may be NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, sixteens = arguments
        largest = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [float("-inf")] * GROUP_ROWS))
        with cgutils.for_range(builder, sixteens) as loop:
            here = _load(builder, builder.add(values, builder.mul(loop.index, _I64(4 * GROUP_ROWS))), 0, _FLOATS)
            known = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", here, known), here, known), largest)
        kind = ir.FunctionType(_F32, [_FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{GROUP_ROWS}f32")
        return builder.call(reduce, [builder.load(largest)])

    return types.float32(types.int64, types.int64), generate


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


def _reach(groups: int, queries: int) -> Any:
    """What `reach_floors` does; sixteen sums fit into registers, and each row or query loaded is used several times."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, steps, bias, scale, radius, norm, words, factors, floors, bits, stride = arguments
        dots = _int8_dots(builder, packed, bias, words, steps, groups, queries)
        for group in range(groups):
            scales, radii, norms = (
                _load(builder, address, group * GROUP_ROWS * 4, _FLOATS) for address in (scale, radius, norm)
            )
            for j in range(queries):
                unit = _spread(builder, _load(builder, factors, 4 * j, _F32))
                doubt = _spread(builder, _load(builder, factors, 4 * (BLOCK_QUERIES + j), _F32))
                floor = _spread(builder, _load(builder, floors, 4 * j, _F32))
                margin = builder.fadd(builder.fmul(norms, doubt), radii)
                bound = builder.fadd(builder.fmul(builder.fmul(dots[group][j], scales), unit), margin)
                reached = builder.bitcast(builder.fcmp_unordered(">=", bound, floor), _I16)
                place = builder.add(bits, builder.mul(stride, _I64(j)))
                builder.store(reached, _pointer(builder, place, 2 * group, _I16), align=2)
        return context.get_dummy_value()

    return generate


def _int8_dots(builder: Any, packed: Any, bias: Any, words: Any, steps: Any, groups: int, queries: int) -> Any:
    """<16 x float>[groups][queries]: inner products, exact but for the rounding to float."""
    sums = [[cgutils.alloca_once(builder, _INTS) for _ in range(queries)] for _ in range(groups)]
    for group in range(groups):
        begin = _load(builder, bias, group * GROUP_ROWS * 4, _INTS)
        for total in sums[group]:
            builder.store(begin, total)
    group_bytes = builder.mul(steps, _I64(4 * GROUP_ROWS))
    with cgutils.for_range(builder, steps) as loop:
        here = builder.add(packed, builder.mul(loop.index, _I64(4 * GROUP_ROWS)))
        rows = [
            _load(builder, builder.add(here, builder.mul(group_bytes, _I64(group))), 0, _INTS)
            for group in range(groups)
        ]
        word = builder.add(words, builder.mul(loop.index, _I64(4 * BLOCK_QUERIES)))
        for j in range(queries):
            query = _spread(builder, _load(builder, word, 4 * j, _I32))
            for group in range(groups):
                total = builder.load(sums[group][j])
                builder.store(_add_products(builder, total, query, rows[group]), sums[group][j])
    return [[builder.sitofp(builder.load(total), _FLOATS) for total in of_group] for of_group in sums]


def _add_products(builder: Any, total: Any, query: Any, rows: Any) -> Any:
    """``total`` plus, in each lane, the sum of four products of an unsigned with a signed byte."""
    if has_int8_dots():
        kind = ir.FunctionType(_INTS, [_INTS, _INTS, _INTS])
        instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(instruction, [total, query, rows])
    count = 4 * GROUP_ROWS
    narrow, wide = ir.VectorType(_I8, count), ir.VectorType(_I32, count)
    unsigned = builder.zext(builder.bitcast(query, narrow), wide)
    signed = builder.sext(builder.bitcast(rows, narrow), wide)
    products = builder.mul(unsigned, signed)
    for part in range(4):
        total = builder.add(total, _pick(builder, products, list(range(part, count, 4))))
    return total


def _pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any, align: int = 4) -> Any:
    """The value ``offset`` bytes from an address; NumPy aligns arrays to their items, not to vectors."""
    return builder.load(_pointer(builder, address, offset, kind), align=align)


def _pick(builder: Any, vector: Any, lanes: list[int]) -> Any:
    nothing = ir.Constant(vector.type, ir.Undefined)
    return builder.shuffle_vector(vector, nothing, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _spread(builder: Any, value: Any) -> Any:
    """``value`` in each of sixteen lanes."""
    nothing = ir.Constant(ir.VectorType(value.type, GROUP_ROWS), ir.Undefined)
    return _pick(builder, builder.insert_element(nothing, value, _I32(0)), [0] * GROUP_ROWS)
