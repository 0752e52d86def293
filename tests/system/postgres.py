"""A Postgres server of Debian's packages, for the tests of MLflow for a team."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from infra.local.server_process import Server


def postgres_programs() -> Path | None:
    """Folder with Postgres' programs, on the PATH or where Debian puts them; None where there are none."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


class Postgres(Server):
    """A server with an empty cluster, on loopback. It asks every user for a password."""

    name = "Postgres"
    superuser = "postgres"

    def __init__(self, programs: Path) -> None:
        super().__init__()
        self.programs, self.password = programs, secrets.token_urlsafe(20)

    def command(self) -> list[str]:
        data, password = self.scratch / "data", self.scratch / "password"
        if not data.exists():
            data.mkdir(mode=0o700)
            password.touch(mode=0o600)
            password.write_text(self.password)
            if os.geteuid() == 0:  # Postgres refuses to run as root
                self.scratch.chmod(0o711)
                for path in (data, password):
                    shutil.chown(path, "nobody", "nogroup")
            options = ["--auth=scram-sha-256", f"--username={self.superuser}", f"--pwfile={password}", "--no-sync"]
            initdb = [*self._as_user(), str(self.programs / "initdb"), f"--pgdata={data}", *options]
            subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/")
            password.unlink()
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        return [*self._as_user(), str(self.programs / "postgres"), "-D", str(data), *flags]

    def _as_user(self) -> list[str]:
        root = os.geteuid() == 0
        return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if root else []

    def ready(self) -> bool:
        command = [str(self.programs / "pg_isready"), "--host=127.0.0.1", f"--port={self.port}", "--quiet"]
        return subprocess.run(command, check=False).returncode == 0

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which Postgres' programs use this server as the superuser."""
        return self.of_user(self.superuser, self.password, "postgres")

    def of_user(self, user: str, password: str, database: str) -> dict[str, str]:
        """Environment variables for a user and a database."""
        where = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port)}
        return {**where, "PGUSER": user, "PGPASSWORD": password, "PGDATABASE": database}
