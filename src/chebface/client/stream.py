"""Many photographs: results in order, a bounded number at once, crops of several photos in one request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from chebface.client.wire import Deadline

Arrays = tuple[np.ndarray, ...]
Sender = Callable[[np.ndarray, Deadline], Arrays]
T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 2  # requests at once: the server computes one while the next is on its way
AHEAD = 2  # photos begun, as a multiple of the threads: so that one slow photo holds up its results only


class _Item:
    def __init__(self, crops_u8: np.ndarray, deadline: Deadline) -> None:
        self.crops_u8, self.deadline = crops_u8, deadline
        self.done = False
        self.answer: Arrays = ()
        self.error: BaseException | None = None


class Batcher:
    """Groups what threads ask at the same time. No timer: a request leaves as soon as fewer than IN_FLIGHT are out,
    so that groups grow only while the server is the slower side."""

    def __init__(self, send: Sender, max_batch: int) -> None:
        """
        Args:
            send: crops (B, 112, 112, 3) uint8 and a deadline to arrays (B, ...).
            max_batch: crops per request at most.
        """
        self._send, self._max_batch = send, max_batch
        self._change = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._out = 0

    def ask(self, crops_u8: np.ndarray, deadline: Deadline) -> Arrays:
        """As `send`, for at most max_batch crops; the request may carry those of other threads too.

        It has the time of the youngest of them.
        """
        item = _Item(crops_u8, deadline)
        with self._change:
            self._waiting.append(item)
        while True:
            with self._change:
                self._change.wait_for(lambda: item.done or (self._out < IN_FLIGHT and item in self._waiting))
                if item.done:
                    break
                group = self._take()
                self._out += 1
            self._serve(group)
        if item.error is not None:
            raise item.error
        return item.answer

    def _take(self) -> list[_Item]:
        group = [self._waiting.popleft()]
        count = len(group[0].crops_u8)
        while self._waiting and count + len(self._waiting[0].crops_u8) <= self._max_batch:
            group.append(self._waiting.popleft())
            count += len(group[-1].crops_u8)
        return group

    def _serve(self, group: list[_Item]) -> None:
        try:
            crops = np.concatenate([item.crops_u8 for item in group])
            answer = self._send(crops, max((item.deadline for item in group), key=Deadline.left_s))
            first = 0
            for item in group:
                last = first + len(item.crops_u8)
                item.answer = tuple(array[first:last] for array in answer)
                first = last
        except BaseException as error:
            for k, item in enumerate(group):
                item.error = error if k == 0 else _copy(error)
        finally:
            with self._change:
                self._out -= 1
                for item in group:
                    item.done = True
                self._change.notify_all()


def _copy(error: BaseException) -> BaseException:
    """One error object per photo: a raised one carries its own traceback."""
    twin = type(error)(*error.args)
    twin.__cause__ = error.__cause__
    return twin


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results of `work` in the order of the items, which are taken only as fast as results are."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="chebface-map")
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            while begun and (len(begun) >= AHEAD * threads or begun[0].done()):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
