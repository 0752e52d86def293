"""What stands where in a run's folder, `<root>/<name>/`: the one place that knows its layout."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.storage import files, fileset


@dataclass(frozen=True)
class RunFolder:
    """URLs below a run's own.

    A checkpoint's name is `<images, 12 digits>-<state digest8>`, so names sort by position.
    """

    url: str

    @property
    def record(self) -> str:
        """What must survive the driver: method, MLflow run, worker-group starts, images lost, where the images are."""
        return files.join(self.url, "run.json")

    @property
    def summary(self) -> str:
        return files.join(self.url, "summary.json")

    @property
    def trials(self) -> str:
        """Of a sweep: how each trial ended."""
        return files.join(self.url, "trials.json")

    @property
    def plane(self) -> str:
        """Of a sweep: the picture of the score over its space."""
        return files.join(self.url, "plane.png")

    @property
    def report(self) -> str:
        """The page about it, at the end."""
        return files.join(self.url, "report.html")

    @property
    def animation(self) -> str:
        """Its sample grids one after another, at the end."""
        return files.join(self.url, "grids.gif")

    def checkpoint(self, name: str) -> str:
        return files.join(self.url, "checkpoints", name)

    def score(self, checkpoint: str) -> str:
        return files.join(self.url, "scores", f"{checkpoint}.json")

    def grid(self, checkpoint: str) -> str:
        return files.join(self.url, "grids", f"{checkpoint}.png")

    def checkpoints(self) -> list[str]:
        """Names of the complete ones, those whose manifest stands, oldest first."""
        names = sorted(files.list_names(files.join(self.url, "checkpoints")))
        return [name for name in names if fileset.read_manifest(self.checkpoint(name))]

    def scored(self) -> list[str]:
        """Names of the checkpoints that have a score, oldest first."""
        return [name.removesuffix(".json") for name in sorted(files.list_names(files.join(self.url, "scores")))]


def images_of(checkpoint: str) -> int:
    """The position that a checkpoint's name says."""
    return int(checkpoint.split("-")[0])
