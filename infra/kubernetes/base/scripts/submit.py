"""Submit a job under its name, print its log, and submit it again where its head or its driver was lost.

Usage: `submit.py ENTRYPOINT`. The pod of Kubernetes that runs this file sets RAY_DASHBOARD_ADDRESS (HOST:PORT of the
head), RAY_JOB_SUBMISSION_ID (the name) and Ray's token. The exit code is 0 if the job has succeeded or a person has
stopped it, and 1 if it has failed for good. To submit a job again is safe: it resumes from its newest checkpoint, and
at most one driver commits to a run (pipeline/runs/owner.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
FAILURES = 20  # in a row, until the job has failed for good; with their pauses they take more than an hour
PROGRESS_S = 600.0  # a job that ran for so long has left its failures behind
STOPPED_S = 90.0  # stop_jobs.py stops the jobs of a head that will be gone then; a person stops those of one that stays
ENVIRONMENT_FAULT = 3  # exit code of a job whose cluster, storage or tracker was not there: pipeline/errors.py


def main() -> int:
    address, name, entrypoint = os.environ["RAY_DASHBOARD_ADDRESS"], os.environ["RAY_JOB_SUBMISSION_ID"], sys.argv[1]
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{address}"  # Ray prefers the variable to an argument
    failures, pause, stopped = 0, PAUSE_S, 0.0
    while True:
        try:
            client = JobSubmissionClient()
            job = next((job for job in client.list_jobs() if job.submission_id == name), None)
            if job is None:  # on a new head, too
                _say(f"{address} does not know {name}; submitting it")
                client.submit_job(entrypoint=entrypoint, submission_id=name)
            elif not job.status.is_terminal():
                asyncio.run(_print_log(client, name))
            elif job.status == JobStatus.SUCCEEDED or stopped > STOPPED_S:
                _say(f"{name} has ended: {job.status}")
                return 0
            elif job.status == JobStatus.FAILED:
                failures = 1 if _seconds(job) > PROGRESS_S else failures + 1
                if failures > FAILURES or not can_start_again(job.driver_exit_code):
                    _say(f"{name} has failed for good: {job.message}")
                    return 1
                pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
                _say(f"{name} has failed with exit code {job.driver_exit_code}; submitting it again in {pause:g} s")
                client.delete_job(name)
            stopped = stopped + pause if job and job.status == JobStatus.STOPPED else 0.0
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            _say(f"{address} does not answer: {error}; trying again in {pause:g} s")
        time.sleep(pause)
        pause = PAUSE_S


def can_start_again(exit_code: int | None) -> bool:
    """Return whether a new driver may succeed where a driver ended with this exit code.

    None, a negative number and a number above 127 say that the driver was killed or interrupted.
    """
    return exit_code is None or exit_code < 0 or exit_code > 127 or exit_code == ENVIRONMENT_FAULT


async def _print_log(client: Any, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


def _seconds(job: Any) -> float:
    return ((job.end_time or 0) - (job.start_time or 0)) / 1000


def _say(text: str) -> None:
    print(f"submit: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
