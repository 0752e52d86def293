#!/bin/sh
# Starts MLflow for a team, as README.md describes. All settings and secrets come from the environment. No argument has
# a secret, since every user of the machine can read arguments.
set -eu

for name in PGHOST PGUSER PGPASSWORD PGDATABASE MLFLOW_ARTIFACTS_DESTINATION MLFLOW_FLASK_SERVER_SECRET_KEY \
    MLFLOW_SERVER_ALLOWED_HOSTS MLFLOW_SERVER_CORS_ALLOWED_ORIGINS; do
    if [ -z "$(printenv "$name")" ]; then
        echo "error: $name is not set; infra/mlflow/README.md lists the settings" >&2
        exit 2
    fi
done
case ",$MLFLOW_SERVER_ALLOWED_HOSTS,$MLFLOW_SERVER_CORS_ALLOWED_ORIGINS," in
*,\*,*)
    echo "error: * in MLFLOW_SERVER_ALLOWED_HOSTS or MLFLOW_SERVER_CORS_ALLOWED_ORIGINS admits every site" >&2
    exit 2
    ;;
esac

MLFLOW_AUTH_CONFIG_PATH="$(cd "$(dirname "$0")" && pwd)/basic_auth.ini"
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # otherwise a dozen processes wait for jobs of MLflow's own
export MLFLOW_AUTH_CONFIG_PATH MLFLOW_SERVER_ENABLE_JOB_EXECUTION

# The URI names nothing: Postgres' library reads PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE and PGSSLMODE.
exec mlflow server --app-name basic-auth --serve-artifacts --backend-store-uri postgresql+psycopg2:///
