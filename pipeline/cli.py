"""The command line: `sagan …` and `python -m pipeline …` alike."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config.load import load, parse_overrides, to_yaml
from pipeline.errors import SaganError, UsageError

if TYPE_CHECKING:
    from pipeline.config.schema import EvaluateJob

app = typer.Typer(
    name="sagan",
    help="Self-Attention GANs on Ray: pack images into shards, train, search, score, and pull the champion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, e.g. jobs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keys that differ from the file: train.workers=2")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object for machines instead of words for people.")]


@app.command(epilog="Example: `sagan run jobs/cifar10.yaml train.workers=2 data.train=s3://bucket/cifar10`")
def run(
    job: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would be done, with the arithmetic; start nothing.")] = False,
    fresh: Annotated[bool, typer.Option(help="Delete the run of this name first and start over.")] = False,
    as_json: Json = False,
) -> None:
    """Run a job of any kind. The same command resumes what was interrupted."""
    from pipeline import jobs

    resolved = load(job, parse_overrides(overrides or []))
    if dry_run:
        planned = jobs.dry_run(resolved)
        _show(planned if isinstance(planned, dict) else planned.to_dict(), as_json, "would run")
    else:
        _show(jobs.execute(resolved, fresh=fresh), as_json, "done")


@app.command(epilog="Example: `sagan config jobs/imagenet128.yaml train.kimg=1000`")
def config(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB]", help="A job file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option(help="The JSON schema of every kind of job, for editors.")] = False,
) -> None:
    """Show a job with every default visible, or the schema of all jobs."""
    from pydantic import TypeAdapter

    from pipeline.config.schema import Job

    if schema:
        print(json.dumps(TypeAdapter(Job).json_schema(), indent=1, ensure_ascii=False))
    elif job is not None:
        print(to_yaml(load(job, parse_overrides(overrides or []))), end="")
    else:
        raise UsageError("nothing to show", "name a job file, or ask for --schema")


@app.command(
    epilog="Examples: `sagan pack photos/ s3://bucket/photos128` · "
    "`sagan pack train=train.tar heldout=test.tar s3://bucket/cifar10 --resolution 32 --encoding png` · "
    "`sagan pack s3://bucket/shards --index-only`"
)
def pack(
    sources: Annotated[list[str], typer.Argument(metavar="[SPLIT=]SOURCE… DESTINATION")],
    resolution: Annotated[int, typer.Option(help="Pixels per side: 32, 64, 128 or 256.")] = 128,
    encoding: Annotated[str | None, typer.Option(help="jpeg, png or webp; default png at 32 px, else jpeg.")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality.")] = 95,
    chroma: Annotated[str, typer.Option(help="JPEG colour: 4:4:4 whole, 4:2:0 halved.")] = "4:4:4",
    shard_images: Annotated[int, typer.Option(help="Images per shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the order in which samples are written.")] = 0,
    max_broken: Annotated[int, typer.Option(help="Undecodable images that are tolerated.")] = 0,
    exclude: Annotated[str | None, typer.Option(help="File with names of images to leave out, one a line.")] = None,
    index_only: Annotated[bool, typer.Option(help="SOURCE is WebDataset shards: index them where they are.")] = False,
) -> None:
    """Pack images into shards; from and to any URL.

    SOURCE is a folder of images per class or a tar of such; ImageNet, CIFAR, Tiny ImageNet, CelebA or LSUN as they are
    published; WebDataset shards; Parquet with images; a table of path,label (TABLE#COLUMN names the label); `digits`.
    """
    from pipeline.config.load import parse
    from pipeline.config.schema import PackJob
    from pipeline.jobs import execute

    *given, destination = sources * 2 if index_only and len(sources) == 1 else sources
    if not given:
        raise UsageError("no source is given", "sagan pack SOURCE DESTINATION")
    splits = {name: source for name, _, source in (s.partition("=") for s in given if "=" in s)}
    plain = [s for s in given if "=" not in s]
    if len(plain) > 1 or (plain and splits):
        raise UsageError("several sources need names", "sagan pack train=A heldout=B DESTINATION")
    section = {
        "source": plain[0] if plain else splits,
        "resolution": resolution,
        "encoding": encoding,
        "quality": quality,
        "chroma": chroma,
        "shard_images": shard_images,
        "seed": seed,
        "max_broken": max_broken,
        "exclude": exclude,
        "index_only": index_only,
    }
    job = parse({"kind": "pack", "name": "pack", "destination": destination, "pack": section}, "sagan pack")
    assert isinstance(job, PackJob)
    execute(job)


@app.command(epilog="Example: `sagan verify s3://bucket/imagenet128 > bad.txt`, which `sagan pack --exclude` takes")
def verify(url: Annotated[str, typer.Argument(help="Shards, or a checkpoint.")]) -> None:
    """Check every hash, and every image of a packed collection: names of bad ones go to stdout, all else to stderr."""
    from pipeline.data.index import INDEX
    from pipeline.data.verify import verify as verify_collection
    from pipeline.storage import files, fileset
    from pipeline.training import cluster

    if files.exists(files.join(url, INDEX)):
        cluster.join()
        collection = verify_collection(url)
        checked = f"{len(collection.labels):,} images in {len(collection.shards):,} shards"
    else:
        checked = f"{len(fileset.verify(url).files)} files"
    print(f"{url}: {checked}, all right", file=sys.stderr)


@app.command(
    epilog='Example: `sagan sample models:/imagenet128@champion --out dogs.png --classes "golden retriever" --n 16`'
)
def sample(
    model: Annotated[
        str, typer.Argument(help="Registry URI (models:/NAME@champion), checkpoint URL or pulled folder.")
    ],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    n: Annotated[int, typer.Option(help="How many images.")] = 64,
    classes: Annotated[str | None, typer.Option(help="Names or numbers, separated by commas; default all.")] = None,
    truncation: Annotated[float, typer.Option(help="Scales latents: below 1 more typical, less varied.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same images.")] = 0,
) -> None:
    """Write a labelled grid of samples."""
    from pipeline.data.grids import grid
    from pipeline.evaluation.models import open_model

    generator = open_model(model)
    wanted = [c.strip() for c in classes.split(",")] if classes else None
    try:
        labels = generator.labels(wanted, n)
        images = generator.sample(wanted, n, seed, truncation)
    except ValueError as error:
        raise UsageError(str(error)) from None
    names = generator.class_names
    captions = None if labels is None else [names[i] if names else str(i) for i in labels.tolist()]
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(images, captions, columns=max(1, round(n**0.5))).save(out)
    print(f"{n} images in {out}")


@app.command(
    epilog="Examples: `sagan evaluate models:/cifar10@champion --reference s3://bucket/cifar10 --download` · "
    "`sagan evaluate --self-test --reference s3://bucket/cifar10 --extractor classifier`"
)
def evaluate(
    reference: Annotated[str, typer.Option(help="Packed collection to compare with.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Registry URI, checkpoint URL or pulled folder.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception, vgg16, clip-…, dinov2-…, classifier, or a .ts/.pt2 file.")
    ] = "inception",
    weights: Annotated[
        str | None, typer.Option(help="Weights file (URL) of inception, vgg16, clip-…, dinov2-….")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the published weights if they are missing.")
    ] = False,
    resize: Annotated[str, typer.Option(help="fidelity, or clean: antialiased, for fid_clean.")] = "fidelity",
    precision: Annotated[str, typer.Option(help="The extractor's: float32 or float64.")] = "float32",
    samples: Annotated[int | None, typer.Option(help="Images; default 50000, of a self-test 2000.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of latents and labels.")] = 0,
    generator: Annotated[str, typer.Option(help="Weights of a checkpoint: ema or raw.")] = "ema",
    running: Annotated[bool, typer.Option("--running", help="A checkpoint's running averages in batch norm.")] = False,
    workers: Annotated[int, typer.Option(help="Ray workers that share the images.")] = 1,
    gpus: Annotated[float | None, typer.Option(help="GPUs of each; default 1 where this machine has any.")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Try the extractor instead, on real images and spoilt ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a model against a collection; or find out whether scores under an extractor mean something."""
    import torch

    from pipeline.config.load import parse
    from pipeline.config.schema import EvaluateJob
    from pipeline.jobs import execute

    if (model is None) != self_test:
        raise UsageError("give either a model or --self-test", "sagan evaluate MODEL --reference SHARDS")
    section: dict[str, Any] = {"extractor": extractor, "weights": weights, "download": download, "resize": resize}
    section |= {"workers": workers, "gpus": float(torch.cuda.is_available()) if gpus is None else gpus}
    section |= {"precision": precision, "samples": samples or (2000 if self_test else 50_000), "seed": seed}
    section |= {"generator": generator} | ({"standing_images": None} if running else {})
    values = {"kind": "evaluate", "name": "evaluate", "model": model or "", "reference": reference, "evaluate": section}
    job = parse(values, "sagan evaluate")
    assert isinstance(job, EvaluateJob)
    if self_test:
        _self_test(job, as_json)
    else:
        _show(execute(job), as_json, "scores")


def _self_test(job: EvaluateJob, as_json: bool) -> None:
    from pipeline.evaluation import selftest
    from pipeline.jobs import self_test

    findings = self_test(job)
    if as_json:
        print(json.dumps({"self_test": [asdict(one) for one in findings]}, indent=1, ensure_ascii=False))
    else:
        table = Table(
            "real images against", "distance", "should be", "", title="self-test", title_justify="left", box=None
        )
        for one in findings:
            table.add_row(
                one.what,
                "–" if one.distance is None else f"{one.distance:.4g}",
                one.expected,
                "FAILS" if one.failure else "ok",
            )
        Console().print(table)
    selftest.require_passed(findings)


@app.command(
    epilog="Examples: `sagan pull models:/quickstart@champion champion/` · "
    "`sagan pull models:/quickstart@champion state/ --checkpoint`"
)
def pull(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="The training state it was made from.")] = False,
) -> None:
    """Bring a registered model into a folder that torch and safetensors alone can load."""
    from pipeline.tracking import registry
    from pipeline.tracking.tracker import default_uri

    if checkpoint:
        folder = registry.pull_checkpoint(default_uri(), model, destination)
        print(f"the training state behind {model} is in {folder}; load it with: sagan.TrainState.load({str(folder)!r})")
        return
    folder = registry.pull(default_uri(), model, destination)
    print(f"{model} is in {folder}; load it with: sagan.load({str(folder)!r})")


@app.command(epilog='Example: `sagan promote imagenet128 7 --force "6 shows memorised images"`')
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Version that becomes champion.")],
    force: Annotated[str | None, typer.Option(help="Reason for a version that is not the best.")] = None,
) -> None:
    """Move the alias `champion` by hand; an older version withdraws the newer ones."""
    from pipeline.tracking import registry
    from pipeline.tracking.tracker import default_uri

    registry.promote(default_uri(), name, version, force)
    print(f"models:/{name}@champion is version {version}")


@app.command(epilog="Examples: `sagan report s3://bucket/runs/cifar10` · `sagan report runs/first runs/second`")
def report(
    of: Annotated[
        list[str],
        typer.Argument(metavar="RUN|SWEEP [RUN]", help="Folder of a run or a sweep, a checkpoint, a model; or two."),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(help="Generated images, compared with as many real ones.", min=1)] = 2000,
) -> None:
    """Write one page to look at: scores, samples, classes, nearest real images, attention to explore."""
    from pipeline.report import report as pages

    if len(of) > 2:
        raise UsageError(f"{len(of)} runs are given", "a page shows one, or two side by side")
    size = pages.write(of, out, samples)
    print(f"{out}: {size / 1e6:.1f} MB; any browser opens it, without a network")


@app.command(epilog="Example: `sagan doctor --cluster`")
def doctor(
    cluster: Annotated[bool, typer.Option(help="Ask the Ray cluster too.")] = False, as_json: Json = False
) -> None:
    """Check what this machine has, and say what to do about what is missing."""
    from pipeline import doctor as checks

    raise typer.Exit(checks.run(cluster, as_json))


def _show(result: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _flat(result):
        if value is not None:
            table.add_row(key, f"{value:,.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """One row per value; of a protocol only its name, since it is a file of the run."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key == "protocol":
            rows.append((prefix + key, value["id"]))
        elif isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


def main() -> None:
    """Run a command; every failure ends with one message and the exit code of its kind."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        app(standalone_mode=True)
    except SaganError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
