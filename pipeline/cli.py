"""The command line: `sagan …`, or `python -m pipeline …`."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config.job_file import load_job, parse_overrides, to_yaml
from pipeline.config.json_schema import job_schema
from pipeline.errors import EnvironmentFault, SaganError, UsageError, counted, printable, shown_url
from pipeline.runs.score_protocol import ScoreProtocol

if TYPE_CHECKING:
    from pipeline.config.schema import EvaluateJob
    from pipeline.pruning.verdict import Verdict

app = typer.Typer(
    name="sagan",
    help="Train Self-Attention GANs on Ray: pack images into shards, train, search, score, and pull the champion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, for example jobs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Values that replace values of the job file, such as train.workers=2."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: `sagan run jobs/cifar10.yaml train.workers=2 data.train=s3://bucket/cifar10`")
def run(
    job: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Show what the job would do and cost. Start nothing.")] = False,
    fresh: Annotated[
        bool, typer.Option(help="Delete the run of this name first (for a study: all its runs), then start over.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a job of any kind. The same command resumes an interrupted run."""
    from pipeline.job_runner import dry_run_job, run_job

    resolved = load_job(job, parse_overrides(overrides or []))
    if dry_run:
        _show(dry_run_job(resolved), as_json, "dry run")
    else:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # with --json, stdout has nothing but the JSON
            summary = run_job(resolved, fresh=fresh)
        _show(summary, as_json, "done")


@app.command(epilog="Example: `sagan config jobs/imagenet128.yaml train.kimg=1000`")
def config(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB]", help="Job file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of all kinds of jobs, for editors.")] = False,
) -> None:
    """Print a job with all default values, or the schema of all jobs."""
    if schema:
        print(json.dumps(job_schema(), indent=1, ensure_ascii=False))
    elif job is not None:
        print(to_yaml(load_job(job, parse_overrides(overrides or []))), end="")
    else:
        raise UsageError("no job file is given", "give a job file, or --schema")


@app.command(
    epilog="Examples: `sagan pack photos/ s3://bucket/photos128` · "
    "`sagan pack train=train.tar heldout=test.tar s3://bucket/cifar10 --resolution 32 --encoding png` · "
    "`sagan pack s3://bucket/shards --index-only`"
)
def pack(
    sources: Annotated[list[str], typer.Argument(metavar="[SPLIT=]SOURCE… DESTINATION")],
    resolution: Annotated[int, typer.Option(help="Pixels per side: 32, 64, 128 or 256.")] = 128,
    encoding: Annotated[
        str | None, typer.Option(help="jpeg, png or webp. Default: png at 32 px, jpeg at other resolutions.")
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality, 1 to 100.")] = 95,
    chroma: Annotated[
        str, typer.Option(help="Colour resolution of JPEG: 4:4:4 keeps all of it, 4:2:0 halves it.")
    ] = "4:4:4",
    shard_images: Annotated[int, typer.Option(help="Images per shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the order in which samples are written.")] = 0,
    max_broken: Annotated[int, typer.Option(help="Number of broken images that are tolerated.")] = 0,
    max_pixels: Annotated[int, typer.Option(help="Greatest number of pixels of an image of the source.")] = 64_000_000,
    exclude: Annotated[
        str | None, typer.Option(help="File with the names of images to leave out, one per line.")
    ] = None,
    index_only: Annotated[
        bool, typer.Option(help="Index the WebDataset shards of SOURCE where they are. Write no image.")
    ] = False,
) -> None:
    """Pack images into shards. Sources and destination are paths or URLs.

    A source is one of: a folder of images per class, or a tar of such a folder; ImageNet, CIFAR, Tiny ImageNet, CelebA
    or LSUN, as published; WebDataset shards; Parquet files with images; a table with columns path and label
    (TABLE#COLUMN names the column of the label); `digits`.
    """
    from pipeline.config.job_file import parse_job
    from pipeline.config.schema import SPLIT_NAME, PackJob
    from pipeline.job_runner import run_job
    from pipeline.packing.layouts.digits import DIGITS

    *sources, destination = sources * 2 if index_only and len(sources) == 1 else sources
    if not sources:
        raise UsageError("no source is given", "give a source and a destination: sagan pack SOURCE DESTINATION")
    named = {s: re.fullmatch(f"({SPLIT_NAME})=(.+)", s, re.DOTALL) for s in sources}
    splits = {match[1]: match[2] for match in named.values() if match}
    plain = [s for s, match in named.items() if not match]
    if len(splits) + len(plain) < len(sources):
        raise UsageError("two sources are given for one split", "give each split one source")
    own = Path(DIGITS).absolute()
    if DIGITS in (*plain, *splits.values()) and own.exists() and Path(destination).absolute() != own:
        raise UsageError(
            "digits is the name of scikit-learn's data set, but the current folder has a folder of this name",
            "write ./digits for the folder; for scikit-learn's data set, run the command in another folder",
        )
    if len(plain) > 1 or (plain and splits):
        raise UsageError(
            "each of several sources needs the name of its split",
            "name the splits: sagan pack train=A heldout=B DESTINATION",
        )
    section = {
        "source": plain[0] if plain else splits,
        "resolution": resolution,
        "encoding": encoding,
        "quality": quality,
        "chroma": chroma,
        "shard_images": shard_images,
        "seed": seed,
        "max_broken": max_broken,
        "max_pixels": max_pixels,
        "exclude": exclude,
        "index_only": index_only,
    }
    job = parse_job({"kind": "pack", "name": "pack", "destination": destination, "pack": section}, "sagan pack")
    assert isinstance(job, PackJob)
    run_job(job)


@app.command(
    epilog="Example: `sagan verify s3://bucket/imagenet128 > bad.txt`. Pass the file to `sagan pack --exclude`."
)
def verify(url: Annotated[str, typer.Argument(help="URL of a packed collection or of a checkpoint.")]) -> None:
    """Check the size and SHA-256 of every file. In a packed collection, also decode every image.

    The names of bad images go to stdout, one per line. Other messages go to stderr.
    """
    from pipeline.collection.manifest import INDEX
    from pipeline.collection.verify import verify_collection
    from pipeline.compute.cluster import join_named_cluster
    from pipeline.storage import file_sets, files

    if files.exists(files.join(url, INDEX)):
        collection = verify_collection(url, on_cluster=join_named_cluster())
        checked = f"{counted(len(collection.labels), 'image')} in {counted(len(collection.shards), 'shard')}"
    else:
        try:
            checked = counted(len(file_sets.verify_set(url).files), "file")
        except FileNotFoundError:
            raise UsageError(
                f"there is no packed collection and no checkpoint at {url}",
                "give the destination of a `sagan pack`, or a folder below the folder `checkpoints` of a run",
            ) from None
    print(f"{shown_url(url)}: checked {checked}; all are good", file=sys.stderr)


@app.command(
    epilog='Example: `sagan sample models:/imagenet128@champion --out dogs.png --classes "golden retriever" --n 16`'
)
def sample(
    model: Annotated[
        str, typer.Argument(help="Registry URI (models:/NAME@champion), checkpoint URL or pulled folder.")
    ],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
    n: Annotated[int, typer.Option(help="Number of images.", min=1)] = 64,
    classes: Annotated[
        str | None, typer.Option(help="Names or numbers of classes, separated by commas. Default: all classes.")
    ] = None,
    truncation: Annotated[
        float, typer.Option(help="Factor of the latents. Below 1, images are more typical and less varied.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the latents. The same seed gives the same images.", min=0, max=2**64 - 1)
    ] = 0,
) -> None:
    """Write a labelled grid of samples as a PNG file."""
    from pipeline.image_grid import grid
    from pipeline.tracking.open_model import open_model

    if out.suffix.lower() != ".png":
        raise UsageError(f"{out} is not the name of a PNG file", "give a name that ends with .png: --out samples.png")
    _require_writable(out)
    generator = open_model(model)
    chosen = [c.strip() for c in classes.split(",")] if classes else None
    try:
        labels = generator.labels_for(chosen, n)
        images = generator.sample(chosen, n, seed, truncation)
    except ValueError as error:
        raise UsageError(str(error)) from None
    names = generator.class_names
    captions = None if labels is None else [names[i] if names else str(i) for i in labels.tolist()]
    grid(images, captions, columns=max(1, round(n**0.5))).save(out)
    print(f"wrote {counted(n, 'image')} to {out}")


def _require_writable(out: Path) -> None:
    """Check that a file can be written, before the work that it is for. Its folder is created. Raises UsageError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}", "give another file: --out FILE") from None


@app.command(
    epilog="Examples: `sagan evaluate models:/cifar10@champion --reference s3://bucket/cifar10 --download` · "
    "`sagan evaluate --self-test --reference s3://bucket/cifar10 --extractor classifier`"
)
def evaluate(
    reference: Annotated[str, typer.Option(help="URL of the packed collection with the real images.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Registry URI, checkpoint URL or pulled folder.")
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(help="Feature extractor: inception, vgg16, clip-…, dinov2-…, classifier, or a .ts or .pt2 file."),
    ] = "inception",
    extractor_weights: Annotated[
        str | None,
        typer.Option(help="Path or URL of the file with the parameters of inception, vgg16, clip-… or dinov2-…."),
    ] = None,
    extractor_sha256: Annotated[
        str | None,
        typer.Option(help="SHA-256 of the .ts or .pt2 file. The file is a program and runs only if it matches."),
    ] = None,
    trust_extractor: Annotated[
        bool,
        typer.Option("--trust-extractor", help="Run the .ts or .pt2 file without its SHA-256."),
    ] = False,
    download: Annotated[
        bool,
        typer.Option("--download", help="Download the published parameters if they are missing."),
    ] = False,
    resize: Annotated[
        str, typer.Option(help="Resize for inception: fidelity, or clean (antialiased, for fid_clean).")
    ] = "fidelity",
    extractor_dtype: Annotated[
        str, typer.Option(help="Floating-point type of the extractor: float32 or float64.")
    ] = "float32",
    samples: Annotated[
        int | None, typer.Option(help="Number of images. Default: 50000, or 2000 with --self-test.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of latents and labels.")] = 0,
    weights: Annotated[str, typer.Option(help="Parameters of a checkpoint: ema (the moving average) or raw.")] = "ema",
    running: Annotated[
        bool,
        typer.Option(
            "--running",
            help="For a checkpoint, use the running averages of batch norm instead of standing statistics.",
        ),
    ] = False,
    workers: Annotated[int, typer.Option(help="Number of Ray workers that share the images.")] = 1,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs per worker. Default: 1 if this machine has a GPU, otherwise 0.")
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Test the extractor on real images and on degraded images, instead of scoring a model.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a model against a packed collection, or test an extractor on a collection."""
    import torch

    from pipeline.config.job_file import parse_job
    from pipeline.config.schema import EvaluateJob
    from pipeline.job_runner import run_job

    if (model is None) != self_test:
        raise UsageError(
            "give either a model or --self-test",
            "for example: sagan evaluate MODEL --reference COLLECTION",
        )
    section: dict[str, Any] = {"extractor": extractor, "extractor_weights": extractor_weights, "download": download}
    section |= {"extractor_sha256": extractor_sha256, "trust_extractor": trust_extractor}
    section |= {"workers": workers, "gpus": float(torch.cuda.is_available()) if gpus is None else gpus}
    section |= {
        "resize": resize,
        "extractor_dtype": extractor_dtype,
        "samples": (2000 if self_test else 50_000) if samples is None else samples,
        "seed": seed,
    }
    section |= {"weights": weights} | ({"standing_images": None} if running else {})
    values = {"kind": "evaluate", "name": "evaluate", "model": model or "", "reference": reference, "evaluate": section}
    job = parse_job(values, "sagan evaluate")
    assert isinstance(job, EvaluateJob)
    if self_test:
        _self_test(job, as_json)
    else:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            scores = run_job(job)
        _show(scores, as_json, "scores")


def _self_test(job: EvaluateJob, as_json: bool) -> None:
    from pipeline.evaluation.self_test import require_passed
    from pipeline.job_runner import run_self_test

    findings = run_self_test(job)
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
    require_passed(findings)


@app.command(
    epilog="Examples: `sagan pull models:/quickstart@champion champion/` · "
    "`sagan pull models:/quickstart@champion state/ --checkpoint`"
)
def pull(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint",
            help="Download the checkpoint, which is the whole training state, instead of the model.",
        ),
    ] = False,
) -> None:
    """Download a registered model into a folder. Loading it needs torch, numpy and safetensors only."""
    from pipeline.tracking import registry
    from pipeline.tracking.mlflow_run import default_uri

    if checkpoint:
        folder = registry.pull_checkpoint(default_uri(), model, destination)
        print(f"the training state of {model} is in {folder}; load it with: sagan.TrainState.load({str(folder)!r})")
        return
    folder = registry.pull(default_uri(), model, destination)
    print(f"{model} is in {folder}; load it with: sagan.load({str(folder)!r})")


@app.command(
    "import",
    epilog="Examples: `sagan import G_ema.pth --from biggan-pytorch --weights ema --batch-norm-eps 1e-5 --out sagan128`"
    " · `sagan import sagan_128.pth --from mmgeneration --weights ema --batch-norm-eps 1e-5 --scale-offset 1 "
    "--channel-order bgr --out sagan128`",
)
def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Path or URL of the file with the generator's state dict.")
    ],
    peer: Annotated[
        str,
        typer.Option(
            "--from", help="Project that wrote the file: biggan-pytorch, mmgeneration, studiogan or official-tf."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[str | None, typer.Option(help="Weights in the file: ema (the moving average) or raw.")] = None,
    batch_norm_eps: Annotated[
        float | None, typer.Option(help="Constant that the project adds to the variances of batch norm.")
    ] = None,
    scale_offset: Annotated[
        float | None, typer.Option(help="Number that the project adds to the class-dependent scales of the file.")
    ] = None,
    channel_order: Annotated[
        str | None, typer.Option(help="Order of the channels of the project's images: rgb or bgr.")
    ] = None,
    slope: Annotated[
        float | None, typer.Option(help="Negative slope of the generator's rectifiers. Default: 0, ReLU.")
    ] = None,
) -> None:
    """Write the generator of another project's file as a model folder, which can be sampled and scored.

    Names and shapes of the tensors tell resolution, widths, classes, attention, shared embeddings and spectral norm.
    Options give what they do not tell. The command names the options that it needs. Nothing in the file runs.
    """
    from pipeline.importing.import_model import import_model

    given = {"weights": weights, "batch_norm_eps": batch_norm_eps, "scale_offset": scale_offset}
    model = import_model(file, peer, out, {**given, "channel_order": channel_order, "slope": slope})
    classes = f"{model.config.known_num_classes} classes" if model.config.known_num_classes else "no classes"
    attention = ", ".join(map(str, model.config.attention_sizes)) or "none"
    print(f"{model.config.known_resolution} px, {classes}, attention at: {attention}")
    print(f"{file} is in {out}; sample it with: sagan sample {out}")


@app.command(epilog='Example: `sagan promote imagenet128 7 --force "6 shows memorised images"`')
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Version that becomes champion.")],
    force: Annotated[
        str | None, typer.Option(help="Reason to promote a version that is not better than the champion.")
    ] = None,
) -> None:
    """Set the alias `champion` to a version.

    Without --force, the version must be better than the champion. With --force, all newer and all better versions are
    withdrawn, and training does not make them champion again.
    """
    from pipeline.tracking import champion
    from pipeline.tracking.mlflow_run import default_uri

    champion.promote(default_uri(), name, version, force)
    print(f"models:/{name}@champion is version {version}")


@app.command(epilog="Examples: `sagan prune s3://bucket` · `sagan prune s3://bucket --keep-versions 10 --delete`")
def prune(
    bucket: Annotated[
        str | None,
        typer.Argument(help="Bucket or folder that holds the collections and `runs`. Default: $SAGAN_BUCKET."),
    ] = None,
    keep_versions: Annotated[
        int, typer.Option(help="Number of the newest versions of each model that are kept.", min=1)
    ] = 5,
    keep_checkpoints: Annotated[
        int, typer.Option(help="Number of the newest checkpoints of each run that are kept.", min=1)
    ] = 3,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without this option, nothing is changed.")] = False,
    as_json: Json = False,
) -> None:
    """List what nobody needs in the registry and in a bucket, why, and how large it is. Delete it with --delete.

    Listed are old registered versions, old checkpoints of runs, and statistics of collections that are deleted or were
    packed again. Kept is what an alias names and what a run started from, the checkpoints of the versions that are
    kept, the best checkpoint of each run, and everything of a run that is being trained. With a login of MLflow, use
    one that may read everything, such as the administrator's.
    """
    from pipeline.config.locations import absolute
    from pipeline.pruning.prune import Prune
    from pipeline.tracking.mlflow_run import default_uri

    if not (bucket := bucket or os.environ.get("SAGAN_BUCKET")):
        raise UsageError("no bucket is given", "give it: sagan prune s3://bucket; or set SAGAN_BUCKET")
    pruning = Prune(default_uri(), absolute(bucket), keep_versions, keep_checkpoints)
    plan = pruning.plan()
    if not as_json:
        _show_verdicts("kept", [verdict for verdict in plan if not verdict.goes])
        _show_verdicts("goes", [verdict for verdict in plan if verdict.goes])
    lines = sys.stderr if as_json else sys.stdout
    done = []
    for verdict in pruning.delete(plan, lambda line: print(line, file=lines, flush=True)) if delete else []:
        done.append(verdict)
        print(f"{'deleted' if verdict.goes else 'kept'} {printable(verdict.line)}", file=lines, flush=True)
    shown = done if delete else plan
    going = [verdict for verdict in shown if verdict.goes]
    if as_json:
        kept = [verdict for verdict in plan if not verdict.goes] + [verdict for verdict in done if not verdict.goes]
        rows = {"goes": going, "kept": kept}
        print(json.dumps({"deleted": delete, **{k: [v.model_dump() for v in vs] for k, vs in rows.items()}}, indent=1))
        return
    size = f"{len(going)} things, {sum(verdict.size for verdict in going) / 1e6:,.1f} MB"
    print(f"deleted {size}" if delete else f"{size} would be deleted; nothing is changed without --delete")


def _show_verdicts(title: str, verdicts: list[Verdict]) -> None:
    if not verdicts:
        return
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "name", "MB", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "MB" else "left")
    for one in verdicts:
        size = f"{one.size / 1e6:,.1f}" if one.goes else ""
        table.add_row(one.kind, Text(printable(one.name)), size, Text(printable(one.reason)))
    Console().print(table)


@app.command(epilog="Examples: `sagan report s3://bucket/runs/cifar10` · `sagan report runs/first runs/second`")
def report(
    of: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SWEEP|STUDY [RUN]",
            help="One or two of: folder of a run, a sweep or a study, checkpoint URL, model.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    samples: Annotated[
        int, typer.Option(help="Number of generated images that are compared with as many real images.", min=1)
    ] = 2000,
    reference: Annotated[
        str | None, typer.Option(help="URL of the run's collection. Default: the URL that the run recorded.")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="Extractor for the comparison with real images. Default: the run's, unless it is a file."),
    ] = None,
    extractor_sha256: Annotated[
        str | None,
        typer.Option(help="SHA-256 of the .ts or .pt2 file. The file is a program and runs only if it matches."),
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Folder for downloaded shards. Default: as data.cache.")] = None,
) -> None:
    """Write an HTML page with scores, samples, classes, nearest real images and an attention explorer.

    A run of other people decides neither which files run here nor which folders are used.
    """
    from pipeline.report.runs_and_models import Reader
    from pipeline.report.write_report import write_report

    if len(of) > 2:
        raise UsageError(f"{len(of)} runs are given", "give one run, or two runs to show side by side")
    data = {key: value for key, value in {"train": reference, "cache": cache}.items() if value is not None}
    own = {"extractor": extractor, "extractor_sha256": extractor_sha256}
    evaluate = {key: value for key, value in own.items() if value is not None}
    if extractor_sha256 is not None and extractor is None:
        raise UsageError("--extractor-sha256 is given without --extractor", "give the file: --extractor FILE")
    _require_writable(out)
    size = write_report(of, out, samples, Reader(data, evaluate))
    print(f"{out}: {size / 1e6:.1f} MB; open it in a browser, also without a network")


@app.command(epilog="Examples: `sagan status cifar10` · `sagan status s3://bucket/runs/cifar10 --json`")
def status(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of a run or a sweep below $SAGAN_BUCKET/runs (without SAGAN_BUCKET: runs/), or its URL. "
            "For a study, its URL: …/runs/studies/NAME.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what a run is doing: state, position, newest checkpoint, scores, what it waits for, and its last error.

    The command reads the run's folder only. It also works while the cluster or MLflow is gone.
    """
    from pipeline.runs.status_from_folder import look_at_run
    from pipeline.storage import files

    root = files.join(os.environ["SAGAN_BUCKET"], "runs") if os.environ.get("SAGAN_BUCKET") else "runs"
    seen = look_at_run(name if "/" in name else files.join(root, name))
    if as_json:
        print(seen.model_dump_json(indent=1))
    else:
        _show(seen.rows(), False, "status")


@app.command("doctor", epilog="Example: `sagan doctor --cluster`")
def doctor_command(
    cluster: Annotated[bool, typer.Option(help="Also check every node of the Ray cluster.")] = False,
    as_json: Json = False,
) -> None:
    """Check whether this machine has what jobs need. A remedy is shown for each problem."""
    from pipeline.doctor import doctor

    raise typer.Exit(doctor.run(cluster, as_json))


def _show(result: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _flat(result):
        if value is not None:
            table.add_row(Text(key), Text(f"{value:,.6g}" if isinstance(value, float) else printable(str(value))))
    Console().print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return one row per value. A protocol is shown as its id; the run stores its values."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key == "protocol":
            rows.append((prefix + key, ScoreProtocol(**value).id8))
        elif isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows += [(prefix + key, item) for item in value]
        else:
            rows.append((prefix + key, value))
    return rows


def main() -> None:
    """Run a command. A failure prints one message and ends with the exit code of its kind."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without `→` or `é` must not end a command
    try:
        _require_home()
        app(standalone_mode=True)
    except SaganError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _require_home() -> None:
    """Check that there is a home folder, since libraries keep files below it. Raises EnvironmentFault."""
    try:
        Path.home()
    except RuntimeError:
        raise EnvironmentFault(
            "the home folder is unknown: HOME is not set, and this system does not know the user",
            "set HOME to a folder that is writable: export HOME=/tmp/home",
        ) from None


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
