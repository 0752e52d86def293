"""A mailbox of the driver, to which workers and tasks of the cluster send messages without waiting for it."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import Any
from uuid import uuid4

from pipeline.errors import EnvironmentFault

_POLL_S = 0.1  # seconds between two looks for an answer
_EXCHANGE_S = 0.2  # seconds between two messages of `exchange`; a driver collects its messages as often


class _Actor:
    """The process that holds the messages. It lives on the driver's node and ends with the driver."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._asked: set[str] = set()
        self._answers: dict[str, Any] = {}
        self._stop = False

    def put(self, message: Any) -> bool:
        if message is not None:
            self._messages.append(message)
        return self._stop

    def collect(self) -> list[Any]:
        messages, self._messages = self._messages, []
        return messages

    def ask_to_stop(self, stop: bool) -> None:
        self._stop = stop

    def give(self, question: str, answer: Any) -> None:
        self._answers[question] = (answer,)

    def ask(self, question: Question) -> Any:
        """Return the answer as a tuple; None while there is none. The first call leaves the question for the driver."""
        if question.key not in self._asked:
            self._asked.add(question.key)
            self._messages.append(question)
        return self._answers.pop(question.key, None)


class Question:
    """A message that the driver answers with `Mailbox.answer`."""

    def __init__(self, message: Any) -> None:
        self.message = message
        self.key = uuid4().hex


class Sender:
    """The end of a mailbox that workers and tasks hold. It can be sent to them.

    The actor that holds the messages may die at any time. Ray starts it again without the messages that the driver has
    not collected yet.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._newest: Any = None  # message of `exchange` that was not sent yet
        self._stop = False
        self._exchanging: threading.Thread | None = None

    def send(self, message: Any) -> None:
        """Send a message without waiting. It is lost where the mailbox is not available."""
        self._actor.put.remote(message)

    def deliver(self, message: Any, timeout_s: float = 60.0) -> None:
        """Send a message and wait until the mailbox has it.

        Raises EnvironmentFault where the mailbox is not available for `timeout_s` seconds.
        """
        self._call(timeout_s, "put", message)

    def ask(self, message: Any, timeout_s: float = 300.0) -> Any:
        """Send a message to the driver and return its answer, also where the mailbox dies in between.

        Raises EnvironmentFault where the driver does not answer within `timeout_s` seconds.
        """
        question, until = Question(message), time.monotonic() + timeout_s
        while time.monotonic() < until:
            if (answer := self._call(timeout_s, "ask", question)) is not None:
                return answer[0]
            time.sleep(_POLL_S)
        raise EnvironmentFault(f"the driver did not answer within {timeout_s:.0f} s")

    def exchange(self, message: Any) -> bool:
        """Leave a message for the driver, and return whether the driver asked to stop.

        The call never waits, and it may come after every step. A thread sends the newest message five times a second,
        because each takes a millisecond, and the driver's answer to it is the result of later calls. A message that was
        not sent before the next one comes is dropped.
        """
        self._newest = message
        if self._exchanging is None:
            self._exchanging = threading.Thread(
                target=_exchange, args=(weakref.ref(self),), name="exchange", daemon=True
            )
            self._exchanging.start()
        return self._stop

    def __reduce__(self) -> tuple[Any, ...]:
        return Sender, (self._actor,)

    def _call(self, timeout_s: float, method: str, argument: Any) -> Any:
        """Call a method of the actor, again while Ray starts the actor again. Raises EnvironmentFault."""
        import ray

        until = time.monotonic() + timeout_s
        while True:
            try:
                left = max(until - time.monotonic(), _POLL_S)
                return ray.get(getattr(self._actor, method).remote(argument), timeout=left)
            except ray.exceptions.RayError as error:
                if time.monotonic() > until:
                    raise EnvironmentFault(f"the driver's mailbox is not available: {type(error).__name__}") from error
            time.sleep(_POLL_S)


def _exchange(of: weakref.ref[Sender]) -> None:
    """Exchange messages until the sender exists no more."""
    import ray

    while (sender := of()) is not None and ray.is_initialized():
        message, sender._newest = sender._newest, None
        with suppress(ray.exceptions.RayError):  # the mailbox is being started again
            sender._stop = ray.get(sender._actor.put.remote(message))
        del sender
        time.sleep(_EXCHANGE_S)


class Mailbox:
    """The driver's end of a mailbox. Ray starts its actor again where it dies."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        self._actor = ray.remote(_Actor).options(**options).remote()
        self._answers: dict[str, Any] = {}
        self._collected: Any = None  # answer to a call of `collect` that came too late for it
        self.sender = Sender(self._actor)

    def collect(self, timeout_s: float = 5.0) -> list[Any]:
        """Return the messages that arrived since the last call, the oldest first.

        A question that was answered and comes again, because the answer was lost, gets its answer again and is not
        among them. Returns [] where the mailbox is not available.
        """
        import ray

        if self._collected is None:
            self._collected = self._actor.collect.remote()
        try:
            messages: list[Any] = ray.get(self._collected, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:  # the next call waits for the same answer: its messages are not lost
            return []
        except ray.exceptions.RayError:  # its process died and is being started again
            self._collected = None
            return []
        self._collected = None
        new = []
        for message in messages:
            if isinstance(message, Question) and message.key in self._answers:
                self.answer(message, self._answers[message.key])
            else:
                new.append(message)
        return new

    def ask_to_stop(self, stop: bool) -> None:
        """Tell senders whether they must stop, before any answer that follows. The call does not wait."""
        self._actor.ask_to_stop.remote(stop)

    def answer(self, question: Question, answer: Any) -> None:
        """Answer a question that was collected. The call does not wait."""
        self._answers[question.key] = answer
        self._actor.give.remote(question.key, answer)
