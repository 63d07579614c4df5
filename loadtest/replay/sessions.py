"""Which broadcast session each row of a history belongs to; the one definition for player and truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.reader import History, Kind

MINUTE_S = 60
NEVER_S = np.iinfo(np.int64).max


def minute_end(t_s: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[n]: the full minute (s) at which a row of time t_s is delivered: the first one not before it."""
    return -(-t_s // MINUTE_S) * MINUTE_S


@dataclass(frozen=True)
class Sessions:
    """S sessions, and n rows in them.

    of_row int32[n]: the row's session, -1 for an end of a stream that never began. opens bool[n]: the row begins its
    session. epoch int64[n]: number of the session among its stream's, from 1. media int64[n]: snapshots of the
    session so far, the row included: media that flowed. stream int32[S]. start_s int64[S]; end_s int64[S] is
    exclusive, ``NEVER_S`` for a session whose end the file does not tell.
    """

    of_row: NDArray[np.int32]
    opens: NDArray[np.bool_]
    epoch: NDArray[np.int64]
    media: NDArray[np.int64]
    stream: NDArray[np.int32]
    start_s: NDArray[np.int64]
    end_s: NDArray[np.int64]


def split_sessions(history: History, silence_s: int) -> Sessions:
    """A session runs from a live_start, or a snapshot while none runs, to a live_end, the next live_start, or a
    silence of at least ``silence_s`` (what the server calls lease plus grace), after which it is over.
    """
    n, streams = len(history), len(history.ids)
    of_row, opens = np.full(n, -1, np.int32), np.zeros(n, np.bool_)
    epoch, media = np.ones(n, np.int64), np.zeros(n, np.int64)
    stream_of: list[int] = []
    start_s: list[int] = []
    end_s: list[int] = []
    current, epochs, proof_s = [-1] * streams, [0] * streams, [0] * streams
    flowed: list[int] = []
    delivered_s = minute_end(history.t_s).tolist()
    rows = zip(history.t_s.tolist(), history.kind.tolist(), history.stream.tolist())
    for row, (t_s, kind, stream) in enumerate(rows):
        session = current[stream]
        over = session >= 0 and (end_s[session] <= t_s or delivered_s[row] - proof_s[stream] >= silence_s)
        if kind == Kind.START or (kind == Kind.SNAPSHOT and (session < 0 or over)):
            if kind == Kind.START and session >= 0:
                end_s[session] = min(end_s[session], t_s)
            session = current[stream] = len(stream_of)
            epochs[stream] += 1
            stream_of.append(stream)
            start_s.append(t_s)
            end_s.append(NEVER_S)
            flowed.append(0)
            opens[row] = True
            proof_s[stream] = t_s
        if session < 0:
            continue
        if kind == Kind.SNAPSHOT:
            flowed[session] += 1
            proof_s[stream] = t_s
        elif kind == Kind.END:
            end_s[session] = min(end_s[session], t_s)
        of_row[row], epoch[row], media[row] = session, epochs[stream], flowed[session]
    return Sessions(
        of_row, opens, epoch, media, np.array(stream_of, np.int32), np.array(start_s, np.int64),
        np.array(end_s, np.int64),
    )  # fmt: skip
