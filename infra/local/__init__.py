"""S3, MLflow and Ray on one machine: for the quickstart, the tests and a developer (`python -m infra.local`)."""
