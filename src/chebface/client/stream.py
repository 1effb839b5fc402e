"""Many photographs: results in order, a bounded number at once, crops of several photos in one request."""

from __future__ import annotations

import threading
import time
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
LINGER_S = 0.002  # the longest that a request waits for its share of the callers
AHEAD = 2  # photos begun, as a multiple of the threads: so that one slow photo holds up its results only


class _Item:
    def __init__(self, crops_u8: np.ndarray, deadline: Deadline) -> None:
        self.crops_u8, self.deadline = crops_u8, deadline
        self.since = time.monotonic()
        self.wake = threading.Event()  # its own: a shared one would wake everybody for each answer
        self.done = False
        self.answer: Arrays = ()
        self.error: BaseException | None = None


class Batcher:
    """Groups what threads ask at the same time: a request leaves when fewer than IN_FLIGHT are out, and it has its
    share of the callers, or all that are not out, or has waited LINGER_S for them. Without the wait, who is answered
    first would be back alone."""

    def __init__(self, send: Sender, max_batch: int, callers: int) -> None:
        """
        Args:
            send: crops (B, 112, 112, 3) uint8 and a deadline to arrays (B, ...).
            max_batch: crops per request at most.
            callers: threads that ask; up to IN_FLIGHT of them never wait for each other.
        """
        self._send, self._max_batch = send, max_batch
        self._callers, self._share = callers, min(max_batch, -(-callers // IN_FLIGHT))
        self._lock = threading.Lock()
        self._waiting: deque[_Item] = deque()
        self._out, self._carried, self._freed = 0, 0, 0.0

    def ask(self, crops_u8: np.ndarray, deadline: Deadline) -> Arrays:
        """As `send`, for at most max_batch crops; the request may carry those of other threads too.

        It has the time of the youngest of them.
        """
        item = _Item(crops_u8, deadline)
        with self._lock:
            self._waiting.append(item)
        while not item.done:
            with self._lock:
                group, left_s = self._look(item)
            if group:
                self._serve(group)
            elif left_s is None or left_s > 0:
                item.wake.wait(left_s)
                item.wake.clear()
        if item.error is not None:
            raise item.error
        return item.answer

    def _look(self, item: _Item) -> tuple[list[_Item], float | None]:
        """The group that leaves now, if one does, and how long the item may wait before it looks again."""
        if item.done:
            return [], 0.0
        if self._out == IN_FLIGHT or item not in self._waiting:
            return [], None
        left_s = max(self._waiting[0].since, self._freed) + LINGER_S - time.monotonic()
        if len(self._waiting) >= min(self._share, self._callers - self._carried) or left_s <= 0:
            return self._take(), None
        return [], left_s if item is self._waiting[0] else None

    def _take(self) -> list[_Item]:
        group = [self._waiting.popleft()]
        count = len(group[0].crops_u8)
        while self._waiting and len(group) < self._share and count + len(self._waiting[0].crops_u8) <= self._max_batch:
            group.append(self._waiting.popleft())
            count += len(group[-1].crops_u8)
        if self._waiting:
            self._waiting[0].wake.set()
        self._out, self._carried = self._out + 1, self._carried + len(group)
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
            with self._lock:
                self._out, self._carried, self._freed = self._out - 1, self._carried - len(group), time.monotonic()
                woken = [*group, *list(self._waiting)[:1]]
                for item in group:
                    item.done = True
            for item in woken:
                item.wake.set()


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
