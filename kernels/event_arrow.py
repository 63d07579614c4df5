"""Events in Arrow columns to checked rows: reads the buffers where they lie in the message.

The library has checked the batch before (`server.live.arrow_schema.read_batch`): offsets and codes are in range, text
is UTF-8. What this adds is the meaning of the columns. The format is described in
https://arrow.apache.org/docs/format/Columnar.html.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels import event_rows as fields
from kernels import fence
from kernels.event_rows import Names, Rows, check_rows, number_of

_ALL = range(256)
_USES: dict[str, tuple[int, tuple[int, ...] | range]] = {
    "sequence": (fields.SEQUENCE, _ALL),
    "event_time_ms": (fields.TIME_MS, _ALL),
    "epoch": (fields.EPOCH, _ALL),
    "media_sequence": (fields.FIRST, (fence.HEARTBEAT,)),
    "count": (fields.FIRST, (fence.VIEWER_COUNT, *fence.INTERACTIONS)),
    "seconds": (fields.FRACTION, (fence.WATCHED,)),
    "amount_minor": (fields.FIRST, (fence.BID, fence.PURCHASED)),
    "action": (fields.FIRST, (fence.MODERATED,)),
    "only_if_not_renewed_since_ms": (fields.SINCE_MS, (fence.END,)),
    "served_ms": (fields.SINCE_MS, (fence.IMPRESSION,)),
    "verify_by_ms": (fields.VERIFY_BY_MS, (fence.IMPRESSION,)),
    "propensity": (fields.FRACTION, (fence.IMPRESSION,)),
    "stream_id": (fields.STREAM_AT, _ALL),
    "viewer_id": (fields.VIEWER_AT, _ALL),
    "currency": (fields.TEXT_AT, (fence.BID, fence.PURCHASED)),
    "reason": (fields.TEXT_AT, (fence.END, fence.REPORTED)),
    "request_id": (fields.TEXT_AT, (fence.IMPRESSION,)),
    "model_version": (fields.VERSION_AT, (fence.IMPRESSION,)),
}
"""Where a column goes in `check_rows`' input, and for which kinds."""
COLUMNS = (*_USES, "kind")
"""Rows of the table that `decode_columns` takes."""
_KIND, _ACTION = COLUMNS.index("kind"), COLUMNS.index("action")
_INTO = np.array([into for into, _ in _USES.values()])
_FOR = np.zeros((len(_USES), 256), np.bool_)
for _place, (_, _kinds) in enumerate(_USES.values()):
    _FOR[_place, list(_kinds)] = True

ABSENT, FIXED, TEXT32, TEXT64, CODES = range(5)
"""Forms of a column; the last stands for a dictionary."""
FORM, VALIDITY, VALUES, WIDTH, BYTES, DICT_SIZE, DICT_VALIDITY, DICT_OFFSETS, DICT_FORM = range(9)
N_DESCRIBED = 9
"""What the table says of a column: places, in bytes; validity -1 where nothing is null. VALUES: numbers, offsets of
texts, or codes; WIDTH: bytes of a number or code. BYTES: of the texts. DICT_…: of the dictionary's texts."""


@njit(cache=True, nogil=True)
def _spans(
    words: NDArray[np.int64], validity_at: int, offsets_at: int, form: int, bytes_at: int, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(at, length) of n texts; a null has length 0."""
    at, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    data, halves = words.view(np.uint8), words.view(np.int32)
    if form == TEXT32:
        first = offsets_at >> 2
        for i in range(n):
            start = np.int64(halves[first + i])
            at[i], lengths[i] = bytes_at + start, np.int64(halves[first + i + 1]) - start
    else:
        first = offsets_at >> 3
        for i in range(n):
            start = words[first + i]
            at[i], lengths[i] = bytes_at + start, words[first + i + 1] - start
    if validity_at >= 0:
        for i in range(n):
            lengths[i] *= (data[validity_at + (i >> 3)] >> (i & 7)) & 1
    return at, lengths


@njit(cache=True, nogil=True)
def _texts(words: NDArray[np.int64], column: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(at, length) of the n rows of a column of texts; a null has length 0."""
    if column[FORM] < CODES:
        return _spans(words, column[VALIDITY], column[VALUES], column[FORM], column[BYTES], n)
    dict_at, dict_lengths = _spans(
        words, column[DICT_VALIDITY], column[DICT_OFFSETS], column[DICT_FORM], column[BYTES], column[DICT_SIZE]
    )
    at, lengths = np.zeros(n, np.int64), np.zeros(n, np.int64)
    data, validity_at, width = words.view(np.uint8), column[VALIDITY], column[WIDTH]
    for i in range(n):
        if validity_at < 0 or (data[validity_at + (i >> 3)] >> (i & 7)) & 1:
            code, first = np.int64(0), column[VALUES] + i * width
            for k in range(width):
                code |= np.int64(data[first + k]) << (8 * k)
            at[i], lengths[i] = dict_at[code], dict_lengths[code]
    return at, lengths


@njit(cache=True, nogil=True)
def _known(data: NDArray[np.uint8], kinds: Names, at: int, length: int) -> int:
    number = number_of(kinds, data, at, length)
    return 0 if np.isnan(number) else int(number)


@njit(cache=True, nogil=True)
def _read_kinds(words: NDArray[np.int64], column: NDArray[np.int64], kinds: Names, read: NDArray[np.int64]) -> None:
    """The number of each row's kind; 0 where it is null or not known."""
    data, n = words.view(np.uint8), read.shape[0]
    if column[FORM] == FIXED:
        validity_at, values_at = column[VALIDITY], column[VALUES]
        for i in range(n):
            number = data[values_at + i]
            is_set = validity_at < 0 or (data[validity_at + (i >> 3)] >> (i & 7)) & 1
            if is_set and fence.STARTED <= number <= fence.IMPRESSION:
                read[i, fields.KIND] = number
        return
    if column[FORM] < CODES:
        at, lengths = _texts(words, column, n)
        for i in range(n):
            read[i, fields.KIND] = _known(data, kinds, at[i], lengths[i])
        return
    # Each value of a dictionary is looked up once.
    dict_at, dict_lengths = _spans(
        words, column[DICT_VALIDITY], column[DICT_OFFSETS], column[DICT_FORM], column[BYTES], column[DICT_SIZE]
    )
    by_code = np.empty(column[DICT_SIZE], np.int64)
    for value in range(by_code.shape[0]):
        by_code[value] = _known(data, kinds, dict_at[value], dict_lengths[value])
    validity_at, width = column[VALIDITY], column[WIDTH]
    for i in range(n):
        if validity_at < 0 or (data[validity_at + (i >> 3)] >> (i & 7)) & 1:
            code, first = np.int64(0), column[VALUES] + i * width
            for k in range(width):
                code |= np.int64(data[first + k]) << (8 * k)
            read[i, fields.KIND] = by_code[code]


@njit(cache=True, nogil=True)
def _read_numbers(
    words: NDArray[np.int64], column: NDArray[np.int64], read: NDArray[np.int64], into: int, wanted: NDArray[np.bool_]
) -> None:
    data, halves, validity_at = words.view(np.uint8), words.view(np.int32), column[VALIDITY]
    long = column[WIDTH] == 8
    first = column[VALUES] >> (3 if long else 2)
    for i in range(read.shape[0]):
        if wanted[read[i, fields.KIND]] and (validity_at < 0 or (data[validity_at + (i >> 3)] >> (i & 7)) & 1):
            read[i, into] = words[first + i] if long else halves[first + i]


@njit(cache=True, nogil=True)
def _read_texts(
    words: NDArray[np.int64], column: NDArray[np.int64], read: NDArray[np.int64], into: int, wanted: NDArray[np.bool_]
) -> None:
    at, lengths = _texts(words, column, read.shape[0])
    for i in range(read.shape[0]):
        if wanted[read[i, fields.KIND]]:
            read[i, into], read[i, into + 1] = at[i], lengths[i]


@njit(cache=True, nogil=True)
def _read_rows(words: NDArray[np.int64], columns: NDArray[np.int64], kinds: Names, read: NDArray[np.int64]) -> None:
    _read_kinds(words, columns[_KIND], kinds, read)
    for place in range(_INTO.shape[0]):
        form = columns[place, FORM]
        if form == FIXED:
            _read_numbers(words, columns[place], read, _INTO[place], _FOR[place])
        elif form != ABSENT:
            _read_texts(words, columns[place], read, _INTO[place], _FOR[place])
    for i in range(read.shape[0]):  # `count` has no sign
        if fence.VIEWER_COUNT <= read[i, fields.KIND] <= fence.SHARED:
            read[i, fields.FIRST] &= 0xFFFFFFFF


@njit(cache=True, nogil=True)
def _text_bytes(words: NDArray[np.int64], column: NDArray[np.int64], n: int) -> int:
    return _texts(words, column, n)[1].sum()


def text_bytes(words: NDArray[np.int64], column: NDArray[np.int64], n: int) -> int:
    """Bytes of a column of n texts with its dictionary applied. words, column: as `decode_columns` takes them."""
    return int(_text_bytes(words, column, n))


def decode_columns(
    words: NDArray[np.int64], columns: NDArray[np.int64], n: int, kinds: Names, currencies: Names
) -> Rows:
    """Checked rows of n events. The attributes of starts are not looked at.

    Args:
        words: int64[m], the message. columns: int64[len(COLUMNS), 9], what there is of each column, by FORM and so on;
            all it points to must lie in ``words``, VALUES and DICT_OFFSETS at multiples of 8, and be as the library's
            full validation wants it.
        kinds: of every kind its number. currencies: of every known currency what a minor unit is worth.

    Raises:
        ValueError: the table has another shape.

    Cost: a pass per column; about 320 bytes written per event.
    """
    if columns.shape != (len(COLUMNS), N_DESCRIBED):
        raise ValueError(f"columns: [{len(COLUMNS)}, {N_DESCRIBED}] wanted, got {list(columns.shape)}")
    read = np.zeros((n, fields.N_READ), np.int64)
    _read_rows(words, columns, kinds, read)
    return check_rows(words.view(np.uint8), read, currencies)
