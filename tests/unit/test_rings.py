"""Rings between processes: order, bounds, wrapping; and what is packed into them comes out the same."""

from __future__ import annotations

import multiprocessing
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import server.errors
from server.batching.base import Priority
from server.edges.records import (
    AnswerKind,
    Asks,
    pack_gone,
    pack_headless,
    pack_leave,
    pack_refused,
    pack_reply,
    reply_heads,
    unpack_answer,
    unpack_error,
)
from server.edges.ring import HEADER_BYTES, RingClosed, RingReader, RingWriter, new_ring
from server.errors import InvalidRequest, LiverankError, NotFound, Overloaded
from server.retrieval.query import RankQuery


def pair(capacity_bytes: int) -> tuple[RingWriter, RingReader]:
    memory, event = new_ring(capacity_bytes)
    return RingWriter(memory, event), RingReader(os.dup(memory), os.dup(event))


@settings(deadline=None)
@given(st.lists(st.lists(st.binary(max_size=100), min_size=1, max_size=6), max_size=60))
def test_messages_come_out_in_order_however_the_ring_wraps(groups: list[list[bytes]]) -> None:
    writer, reader = pair(256)
    for group in groups:
        sent = 0
        while sent < len(group):  # what does not fit is sent once the reader has made room
            wrote = writer.put(group[sent:])
            assert wrote
            assert reader.take() == group[sent : sent + wrote]
            sent += wrote
    writer.release()
    reader.release()


def test_a_full_ring_takes_nothing_and_overwrites_nothing() -> None:
    writer, reader = pair(128)
    assert writer.put([b"a" * 40, b"b" * 40, b"c" * 40]) == 2
    assert writer.put([b"d" * 40]) == 0
    assert reader.take() == [b"a" * 40, b"b" * 40]
    assert writer.put([b"e" * 56]) == 1 and reader.take() == [b"e" * 56], "half of the ring always fits"
    assert writer.put([b"f" * 121]) == 0, "larger than the ring"


def test_a_reader_that_is_woken_or_reads_no_message_says_so() -> None:
    writer, reader = pair(64)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.take)
        reader.wake()
        assert isinstance(waiting.exception(5.0), RingClosed)

    writer, reader = pair(64)
    writer.put([b"x"])
    os.pwrite(writer.memory, struct.pack("<q", 1 << 40), HEADER_BYTES)
    with pytest.raises(RingClosed, match="no message"):
        reader.take()
    writer.release()
    with pytest.raises(RingClosed):
        writer.put([b"x"])


@settings(deadline=None)
@given(st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=6), max_size=40), st.binary(max_size=30))
def test_rows_of_columns_come_out_as_messages_however_the_ring_wraps(groups: list[list[bytes]], common: bytes) -> None:
    writer, reader = pair(256)
    for group in groups:
        rows = np.frombuffer(b"".join(group), np.uint8)
        offsets = np.cumsum([0, *map(len, group)], dtype=np.int64)
        which = np.arange(len(group))[::-1].copy()
        heads = np.arange(2 * len(group), dtype=np.uint8).reshape(-1, 2)
        wanted = [bytes(head) + common + group[row] for head, row in zip(heads, which, strict=True)]
        while wanted:
            wrote = writer.put_rows(heads, common, rows, offsets, which)
            assert wrote
            assert reader.take() == wanted[:wrote]
            wanted, heads, which = wanted[wrote:], heads[wrote:], which[wrote:]
    writer.release()
    reader.release()
    with pytest.raises(RingClosed):
        writer.put_rows(np.zeros((0, 2), np.uint8), b"", np.zeros(0, np.uint8), np.zeros(1, np.int64), np.zeros(0, int))


def _echo(asks: tuple[int, int], answers: tuple[int, int], count: int) -> None:
    reader, writer = RingReader(*asks), RingWriter(*answers)
    seen = 0
    while seen < count:
        messages = reader.take()
        seen += len(messages)
        while messages:
            messages = messages[writer.put(messages) :]


def test_between_two_processes_nothing_is_lost_torn_or_reordered() -> None:
    asks, answers = new_ring(4_096), new_ring(4_096)
    rng = np.random.default_rng(0)
    messages = [struct.pack("<I", i) * int(rng.integers(1, 60)) for i in range(5_000)]
    child = multiprocessing.get_context("fork").Process(target=_echo, args=(asks, answers, len(messages)))
    child.start()
    writer, reader = RingWriter(*asks), RingReader(*answers)

    def send() -> None:
        left = messages
        while left:
            left = left[writer.put(left[:50]) :]

    sending = threading.Thread(target=send)
    sending.start()
    got: list[bytes] = []
    while len(got) < len(messages):
        got += reader.take()
    sending.join()
    child.join(10.0)
    assert got == messages and child.exitcode == 0


def _come_further(ring: tuple[int, int], steps: int) -> None:
    reader = RingReader(*ring)
    for _ in range(steps):
        reader._at += 8
        reader._tell_done()


def test_how_far_the_reader_has_come_never_looks_less_than_it_was() -> None:
    ring = new_ring(64)
    writer, seen = RingWriter(*ring), 0
    child = multiprocessing.get_context("fork").Process(target=_come_further, args=(ring, 1_500_000))
    child.start()
    while child.is_alive():
        for _ in range(10_000):
            before, seen = seen, writer.done
            assert seen >= before
    assert child.exitcode == 0 and writer.done == 8 * 1_500_000


texts = st.text(max_size=20)
queries = st.builds(
    RankQuery,
    request_id=texts,
    viewer_id=texts,
    embedding=st.none() | st.lists(st.floats(width=32), min_size=4, max_size=4).map(lambda v: np.array(v, np.float32)),
    surface=texts,
    limit=st.integers(1, 500),
    limit_clamped=st.booleans(),
    languages=st.lists(texts, max_size=3).map(tuple),
    categories=st.lists(texts, max_size=3).map(tuple),
    region=texts,
    followed_creator_ids=st.lists(texts, max_size=5).map(tuple),
    exclude_stream_ids=st.lists(texts, max_size=5).map(tuple),
    min_offset=st.integers(0, 2**62),
    deadline_s=st.floats(0, 1e9),
    received_s=st.just(1.5),
    embedding_problem=texts,
)


@given(queries, st.integers(1, 2**63), texts, st.sampled_from(Priority))
def test_a_request_is_the_same_on_the_other_side(query: RankQuery, number: int, client: str, first: Priority) -> None:
    ask = Asks().unpack(Asks().pack(number, client, first, 1.5, query))
    assert (ask.number, ask.client, ask.priority, ask.arrived_s) == (number, client, first, 1.5)
    assert ask.query is not None
    for name in RankQuery.__dataclass_fields__:
        sent, came = getattr(query, name), getattr(ask.query, name)
        if name == "embedding" and sent is not None:
            np.testing.assert_array_equal(sent, came)
        else:
            assert sent == came, name


def test_leaving_and_answers_are_the_same_on_the_other_side() -> None:
    left = Asks().unpack(pack_leave(7))
    assert left.number == 7 and left.query is None
    assert unpack_answer(pack_reply(8, 2.5, b"reply")) == (8, 2.5, AnswerKind.REPLY, False, b"reply")
    assert unpack_answer(pack_gone(9))[::2] == (9, AnswerKind.GONE, b"")
    one = pack_headless(10, 2.5, True, (b"re", memoryview(b"st")))
    assert unpack_answer(one) == (10, 2.5, AnswerKind.HEADLESS, True, b"rest")
    heads = reply_heads([10, 11], 2.5, np.array([False, True]))
    assert [unpack_answer(head.tobytes() + b"rest") for head in heads] == [
        (10, 2.5, AnswerKind.HEADLESS, False, b"rest"),
        (11, 2.5, AnswerKind.HEADLESS, True, b"rest"),
    ]


def all_errors(base: type[LiverankError]) -> list[type[LiverankError]]:
    return [base, *(error for child in base.__subclasses__() for error in all_errors(child))]


@pytest.mark.parametrize(
    "kind", [e for e in all_errors(LiverankError) if e.__module__ == server.errors.__name__], ids=lambda e: e.__name__
)
def test_an_error_of_ours_keeps_class_words_and_hint(kind: type[LiverankError]) -> None:
    error = kind("field", "problem") if issubclass(kind, InvalidRequest) else kind("problem")
    if isinstance(error, Overloaded):
        error.retry_ms = 123
    number, _, refused, _, rest = unpack_answer(pack_refused(3, error))
    came = unpack_error(rest)
    assert (number, refused, type(came), str(came)) == (3, AnswerKind.REFUSED, kind, str(error))
    assert getattr(came, "retry_ms", 0) == getattr(error, "retry_ms", 0)


def test_an_unexpected_fault_crosses_without_its_words() -> None:
    came = unpack_error(unpack_answer(pack_refused(3, RuntimeError("secret"))).rest)
    assert not isinstance(came, LiverankError | NotFound) and "secret" not in str(came)


def test_a_reader_that_does_not_wait_takes_what_is_there() -> None:
    memory, event = new_ring(128)
    writer, reader = RingWriter(memory, event), RingReader(os.dup(memory), os.dup(event), waits=False)
    assert reader.take_what_is_there() == []
    writer.put([b"a"])
    writer.put([b"b"])
    assert reader.take_what_is_there() == [b"a", b"b"]
    assert reader.take_what_is_there() == []
    reader.release()
    with pytest.raises(RingClosed):
        reader.take_what_is_there()
