"""Requests of many clients answered together: those of one shape are stacked and cut apart again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import torch

from metateleport.service.answering import Answerer
from metateleport.service.message import Message, Refused

__all__ = ["Batcher"]

Key = tuple[object, ...]


class Batcher:
    """Gathers requests for a moment and answers those that go together at once.

    Teleports of one group and size go together if the same matrices are known: their spectra and exponentials are
    taken at once. Others are answered one by one. A request that is refused is refused alone. Answers agree with those
    to one request alone to rounding, not bit for bit.

    Args:
        answerer: answers.
        run: runs a function in a thread.
        seconds: how long the first of some requests waits for others.
        most: number of requests that are answered at once.
    """

    def __init__(
        self,
        answerer: Answerer,
        run: Callable[[Callable[[], list[Message | Refused]]], Awaitable[list[Message | Refused]]],
        seconds: float = 0.002,
        most: int = 64,
    ) -> None:
        self.answerer, self.seconds, self.most = answerer, seconds, most
        self._run = run
        self._waiting: dict[Key, list[tuple[Message, asyncio.Future[Message]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, request: Message) -> Message:
        """The answer to a request.

        Raises:
            Refused: if the request cannot be meant.
        """
        key = _key(request)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, [])
        waiting.append((request, future))
        if len(waiting) == 1:
            task = asyncio.create_task(self._after_a_moment(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _after_a_moment(self, key: Key) -> None:
        await asyncio.sleep(self.seconds)
        waiting = self._waiting.pop(key, [])
        for start in range(0, len(waiting), self.most):
            part = waiting[start : start + self.most]
            requests = [request for request, _ in part]
            try:
                answers: Sequence[Message | BaseException] = await self._run(partial(together, self.answerer, requests))
            except BaseException as error:
                answers = [error] * len(part)
            for (_, future), answer in zip(part, answers, strict=True):
                # A client that is gone has cancelled its future.
                if future.done():
                    continue
                if isinstance(answer, BaseException):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


def _key(request: Message) -> Key:
    """What requests have to have in common to be answered at once; one of a kind for those that are answered alone."""
    ask, shapes = request.fields.get("ask"), {name: tuple(value.shape) for name, value in request.tensors.items()}
    dtypes = tuple(sorted((name, str(value.dtype)) for name, value in request.tensors.items()))
    progress = shapes.get("progress", ())
    if ask == "teleport" and 1 <= len(progress) <= 2 and "max_stretch" not in request.fields:
        tail = tuple(sorted((name, shape[len(progress) - 1 :]) for name, shape in shapes.items()))
        return ("teleport", len(progress), repr(request.fields), tail, dtypes)
    return ("alone", object())


def together(answerer: Answerer, requests: Sequence[Message]) -> list[Message | Refused]:
    """The answers to requests that have a key in common, in their order."""
    if len(requests) > 1 and _key(requests[0])[0] == "teleport":
        try:
            return list(_stacked(answerer, requests))
        except Refused:
            # One of them is at fault: each is answered alone.
            pass
    found: list[Message | Refused] = []
    for request in requests:
        try:
            found.append(answerer.answer(request))
        except Refused as refused:
            found.append(refused)
    return found


def _stacked(answerer: Answerer, requests: Sequence[Message]) -> Sequence[Message]:
    first = requests[0]
    single = first.tensors["progress"].ndim == 1
    counts = [0 if single else len(each.tensors["progress"]) for each in requests]
    join = torch.stack if single else torch.cat
    stacked = Message(first.fields, {name: join([each.tensors[name] for each in requests]) for name in first.tensors})
    answer = answerer.answer(stacked, counts)
    parts: list[Message] = []
    start = 0
    for count in counts:
        cut = {name: value[start] if single else value[start : start + count] for name, value in answer.tensors.items()}
        parts.append(Message(answer.fields, cut))
        start += count or 1
    return parts
