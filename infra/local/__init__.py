"""S3, MLflow and Ray on one machine, for the quickstart, for tests and for developers (`python -m infra.local`)."""
