"""Stop the jobs of a head that will be stopped, and wait until they have written their last checkpoints.

Kubernetes runs this file in the container of the head before it stops the container (preStop). A job that KubeRay has
stopped already gets no second signal. Ray kills a job that does not end within RAY_JOB_STOP_WAIT_TIME_S. The submitter
starts the jobs again where a new head takes the place of this one (submit.py).
"""

from __future__ import annotations

import os
import time

from ray.job_submission import JobSubmissionClient

if __name__ == "__main__":
    os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")  # Ray prefers the variable to an argument
    client = JobSubmissionClient()
    running = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for name in running:
        client.stop_job(name)
    while any(not client.get_job_status(name).is_terminal() for name in running):
        time.sleep(0.5)
