"""Questions of the workers are answered and messages arrive, though the process that carries them dies or stops."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from pipeline.compute.cluster import connect
from pipeline.compute.mailbox import Mailbox
from tests.system.command_process import ray_workers

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.fixture(autouse=True)
def _ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of this process's own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect()
    yield
    ray.shutdown()


def next_message(mailbox: Mailbox) -> Any:
    while not (messages := mailbox.collect()):
        time.sleep(0.1)
    (message,) = messages
    return message


def test_a_question_is_answered_once_though_the_mailbox_dies() -> None:
    mailbox = Mailbox()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(mailbox.sender.ask, "may I?")
        question = next_message(mailbox)
        (process,) = ray_workers("_Actor", ray.get_runtime_context().gcs_address)
        os.kill(process, signal.SIGKILL)
        mailbox.answer(question, "yes")
        while not asked.done():
            assert mailbox.collect() == [], "the driver has answered it"
            time.sleep(0.1)
    assert (question.message, asked.result()) == ("may I?", "yes")


def test_messages_that_come_too_late_for_a_call_come_with_the_next_one() -> None:
    mailbox = Mailbox()
    mailbox.sender.deliver("a score")
    (process,) = ray_workers("_Actor", ray.get_runtime_context().gcs_address)
    os.kill(process, signal.SIGSTOP)
    try:
        assert mailbox.collect(timeout_s=0.5) == []
    finally:
        os.kill(process, signal.SIGCONT)
    assert next_message(mailbox) == "a score"
