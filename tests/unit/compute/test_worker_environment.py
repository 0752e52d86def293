from __future__ import annotations

from pipeline.compute.worker_environment import split_environment


def test_secrets_are_kept_from_rays_state() -> None:
    public = {"NCCL_DEBUG": "INFO", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "OMP_NUM_THREADS": "1"}
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "x",
        "aws_session_token": "x",
        "HTTPS_PROXY": "http://user:password@proxy:3128",
        "MLFLOW_TRACKING_PASSWORD": "x",
    }
    assert split_environment(public | secrets) == (public, secrets)
