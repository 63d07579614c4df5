"""Independent parts of a training, in processes of their own. Results and their order are those of one process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Each(Protocol):
    """``map``, or one that does the same elsewhere: work that can be pickled, results in the order of the numbers."""

    def __call__(self, work: Callable[[int], T], numbers: Iterable[int], /) -> Iterable[T]: ...


def one_after_the_other(work: Callable[[int], T], numbers: Iterable[int], /) -> Iterable[T]:
    """In this process."""
    return map(work, numbers)


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, fresh ones: a fork would copy the threads' locks of torch and Numba as they happen to be.

    What is still waiting when the block is left by an exception is not begun.
    """
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def each_in(pool: ProcessPoolExecutor) -> Each:
    """All numbers are handed to the pool at once."""

    def each(work: Callable[[int], Any], numbers: Iterable[int], /) -> Iterable[Any]:
        return pool.map(work, numbers)

    return each
