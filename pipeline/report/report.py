"""One page about a run, a model or a sweep, or about two of them side by side: a file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import SaganError, UsageError
from pipeline.evaluation import metrics
from pipeline.report import attention, explorer, page, samples
from pipeline.report.page import Html, Section, element, joined
from pipeline.report.subjects import Opened, Run, Subject
from pipeline.storage import files
from pipeline.storage.run_folder import RunFolder
from pipeline.tuning.sweep import WORST
from sagan.random import Purpose, latents
from sagan.sampling import Model

EXPLORED = 6  # images of the attention explorer, where their maps fit
FRAMES, FRAME_WIDTH = 6, 960  # sample grids over training, and pixels of each
ROWS, STEPS = 4, 8  # interpolations
SHOWN_CLASSES = 5  # best and worst ones
PER_CLASS = 4  # samples of each
SEED = 0

# Bytes of the file, over all that it shows together; what is left is for text and tables
PAGE_BYTES = 5_000_000
EXPLORER_BYTES, FRAME_BYTES, TILE_BYTES, PLANE_BYTES = 3_200_000, 900_000, 650_000, 50_000
TILES = 2 * ROWS * STEPS + ROWS * (1 + samples.NEIGHBOURS) + 2 * SHOWN_CLASSES * PER_CLASS  # of one subject


def write(wheres: Sequence[str], out: Path, compared: int = 2000) -> int:
    """Write the page about one or two of what `Opened.add` takes.

    `compared` generated images are held against as many real ones. Returns the file's size in bytes.
    Raises UsageError, EnvironmentFault, CorruptError.
    """
    opened = Opened()
    for where in wheres:
        opened.add(where)
    subjects = opened.subjects
    sections = [
        *(_sweep(folder) for folder in opened.sweeps),
        _summary(subjects),
        _scores(subjects),
        _samples(subjects),
        _attention(subjects),
        _interpolation(subjects),
        *_beside_real(subjects, compared),
        _protocols(subjects),
        _method(subjects),
    ]
    title = " and ".join([files.name(f.url) for f in opened.sweeps] or [s.name for s in subjects])
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.write_bytes(page.whole(title, sections).encode())


# --- figures ---------------------------------------------------------------------------------------------------------


def _sweep(folder: RunFolder) -> Section:
    summary, trials = files.read_json(folder.summary), files.read_json(folder.trials)
    key = summary["score"]["key"]
    sign = -1.0 if metrics.higher_is_better(key) else 1.0
    space = list(trials[0]["point"])
    rows = []
    for trial in sorted(trials, key=lambda trial: trial["score"]):
        score = sign * trial["score"] if trial["score"] < WORST else None
        rows.append([trial["name"] or "–", *trial["point"].values(), score, trial["kimg"], trial["reason"]])
    with Image.open(io.BytesIO(files.read_bytes(folder.plane))) as plane:
        alt = f"{key} of every trial over {' and '.join(space)}"
        shown = page.picture(plane.convert("RGB"), alt, PLANE_BYTES, class_="plane")
    best = summary["best"]["trial"]
    said = f"{len(trials)} trials, {summary['stopped_early']} stopped early. Below, the best: {best}."
    table = page.table(["trial", *space, key, "kimg", "ended"], rows, "trials, the best first")
    return Section(f"Sweep {summary['name']}", joined([element("p", said), shown, table]))


def _summary(subjects: Sequence[Subject]) -> Section:
    facts = [_facts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [[name, *(fact.get(name) for fact in facts)] for name in names]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    return Section("Summary", page.table(["", *(s.name for s in subjects)], rows, "figures of the run"))


def _facts(subject: Subject) -> dict[str, object]:
    config = subject.model.config
    facts: dict[str, object] = {
        "resolution": f"{config.size} × {config.size}",
        "classes": config.labels or "none",
        "attention": ", ".join(f"{size}²" for size in config.attention_sizes) or "none",
    }
    if subject.run is None:
        return facts
    run, summary = subject.run, subject.run.summary
    score, final, registered = (summary.get(key) or {} for key in ("score", "final", "registered"))
    facts |= {
        "trained": f"{summary['images'] / 1000:g} kimg" if summary else "not ended yet",
        "images per second": summary.get("images_per_s"),
        "checkpoint shown": run.checkpoint,
        "commit": run.commit,
        "score": _score(score),
        "final score, of other latents": _score(final),
        "class accuracy": summary.get("class_accuracy"),
        "registered": f"models:/{registered['model']}/{registered['version']}" if registered else None,
        "alias": registered.get("alias"),
        "restarts": summary.get("restarts"),
        "images lost": summary.get("images_lost"),
    }
    return facts | {name.replace("_", " "): value for name, value in run.logged.items() if name.startswith(_TOLD)}


_TOLD = ("loss", "gamma")


def _score(score: dict[str, Any]) -> str | None:
    if score.get("value") is None:
        return None
    spread = f" ± {score['deviation']:.2g}" if "deviation" in score else ""
    return f"{score['key']}/{score['protocol']['id']} = {score['value']:.4g}{spread}"


def _scores(subjects: Sequence[Subject]) -> Section:
    """A plot for each metric and protocol; runs share one only where they share both."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for subject, run in _runs(subjects):
        for record in run.scores:
            if (value := record.score.value) is not None:
                line = lines.setdefault((record.score.key, record.score.protocol.id8), {}).setdefault(subject.name, [])
                line.append((record.images / 1000, value))
    plots = []
    for (key, protocol), of_runs in lines.items():
        plots.append(page.curve(of_runs, "kimg", f"{key}/{protocol}"))
        better = max if metrics.higher_is_better(key) else min
        best = {name: better(line, key=lambda point: point[1]) for name, line in of_runs.items()}
        said = "; ".join(f"{name}: best {value:.4g} at {kimg:g} kimg" for name, (kimg, value) in best.items())
        plots.append(element("p", said, "; higher is better." if better is max else "; lower is better."))
    scored = {name for of_runs in lines.values() for name in of_runs}
    if len(scored) > 1 and not any(len(of_runs) > 1 for of_runs in lines.values()):
        plots.insert(0, element("p", NOT_COMPARED, class_="warning"))
    return Section("Scores", joined(plots))


NOT_COMPARED = "These runs were scored under different protocols. Their scores do not compare."


def _protocols(subjects: Sequence[Subject]) -> Section:
    """A column for each protocol; a row that differs is marked."""
    protocols: dict[str, dict[str, Any]] = {}
    used: dict[str, list[str]] = {}
    for subject, run in _runs(subjects):
        ranked = {record.score.protocol.id8 for record in run.scores}
        for id8, protocol in run.protocols.items():
            protocols[id8] = protocol
            used.setdefault(id8, []).append(f"{subject.name}, {'ranking' if id8 in ranked else 'final'}")
    if not protocols:
        return Section("Protocols", Html())
    said = "Scores compare only where every line of their protocols is equal; what differs is marked."
    uses: list[object] = ["for", *(" · ".join(used[id8]) for id8 in protocols)]
    rows = [uses, *_compared_rows(list(protocols.values()))]
    return Section("Protocols", joined([element("p", said), page.table(["", *protocols], rows, "protocols by id")]))


def _compared_rows(columns: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """A row for each key of the columns, with what differs marked."""
    rows: list[list[object]] = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key) for column in columns]
        differs = any(value != values[0] for value in values)
        rows.append([key, *(element("mark", value) if differs else value for value in values)])
    return rows


def _method(subjects: Sequence[Subject]) -> Section:
    methods = {subject.name: run.record["method"] for subject, run in _runs(subjects)}
    if not methods:
        return Section("Method", Html())
    said = "All that decides the numbers" + ("; what differs is marked." if len(methods) > 1 else ".")
    rows = _compared_rows(list(methods.values()))
    shown = element("details", element("summary", said), page.table(["", *methods], rows, "method by key"))
    return Section("Method", shown)


# --- images ----------------------------------------------------------------------------------------------------------


def _samples(subjects: Sequence[Subject]) -> Section:
    frames, budget = FRAMES // len(subjects), _tile_budget(subjects)
    columns = [(s.name, _flipbook(s.run, frames) if s.run else _plain(s.model, budget)) for s in subjects]
    return Section("Samples", page.side_by_side(columns))


def _tile_budget(subjects: Sequence[Subject]) -> int:
    return TILE_BYTES // TILES // len(subjects)


def _flipbook(run: Run, frames: int) -> Html:
    """Sample grids of the same latents over training; the last is shown where scripts do not run."""
    scored = [record for record in run.scores if files.exists(run.folder.grid(record.checkpoint))]
    if not scored:
        return element("p", "No checkpoint has a sample grid yet.")
    last = len(scored) - 1
    chosen = sorted({round(i * last / max(1, frames - 1)) for i in range(frames)} | {last})
    pictures = []
    for i in chosen:
        record = scored[i]
        with Image.open(io.BytesIO(files.read_bytes(run.folder.grid(record.checkpoint)))) as image:
            small = image.convert("RGB")
        small.thumbnail((FRAME_WIDTH, 4 * FRAME_WIDTH), Image.Resampling.LANCZOS)
        value = "no score" if record.score.value is None else f"{record.score.key} {record.score.value:.4g}"
        said = f"{record.images / 1000:g} kimg, {value}"
        alt = f"samples and real images: {said}"
        pictures.append(page.picture(small, alt, FRAME_BYTES // FRAMES, data_said=said, hidden=i != last))
    still = element("div", *pictures, class_="frames", tabindex=0, role="group", aria_label="sample grid")
    return element("div", still, class_="flipbook")


def _plain(model: Model, budget: int) -> Html:
    rows = 2
    names = samples.names(model, rows * STEPS)
    images = model.sample(n=rows * STEPS, seed=SEED).cpu().split(STEPS)
    return _tiles([samples.Row("", part, names[row * STEPS :][:STEPS]) for row, part in enumerate(images)], budget)


def _interpolation(subjects: Sequence[Subject]) -> Section:
    columns, budget = [], _tile_budget(subjects)
    for subject in subjects:
        rows = samples.between_latents(subject.model, ROWS, STEPS, SEED)
        of_classes = samples.between_classes(subject.model, ROWS, STEPS, SEED)
        content = [element("p", "From one latent to another, the class held:"), _tiles(rows, budget, said=False)]
        if of_classes:
            content.append(element("p", "From one class to another, the latent held:"))
            content.append(_tiles(of_classes, budget, said=False))
        columns.append((subject.name, joined(content)))
    return Section("Interpolation", page.side_by_side(columns))


def _tiles(rows: Sequence[samples.Row], budget: int, *, said: bool = True) -> Html:
    return joined(page.tiles(row.title, row.images, row.captions, budget, shown=said) for row in rows)


def _beside_real(subjects: Sequence[Subject], compared: int) -> list[Section]:
    nearest, classes, budget = [], [], _tile_budget(subjects)
    for subject, run in _runs(subjects):
        try:
            beside = _compared(subject.model, run, compared)
        except SaganError as error:
            nearest.append((subject.name, element("p", f"Left out: {error.message}", class_="warning")))
        else:
            nearest.append((subject.name, _nearest(beside, compared, budget)))
            if subject.model.config.labels:
                classes.append((subject.name, _classes(subject.model, beside, compared, budget)))
    return [
        Section("Nearest real images", page.side_by_side(nearest)),
        Section("Classes", page.side_by_side(classes)),
    ]


def _compared(model: Model, run: Run, compared: int) -> samples.Beside:
    data = DataSection.model_validate(run.record["data"])
    # a page is written by one process, wherever it is looked at: there may be no cluster
    section = EvaluateSection.model_validate(run.record["evaluate"] | {"workers": 1})
    collection = Collection.open(data.train)
    if collection.digest != run.record["method"]["data.collection"]:
        raise UsageError(f"{data.train} now holds another collection than the run was trained on")
    return samples.beside_real(model, collection, data, section, compared, ROWS)


def _nearest(beside: samples.Beside, compared: int, budget: int) -> Html:
    said = (
        f"Of {compared:,} generated images those nearest to one of {beside.training_images:,} training images, in the "
        f"features of {beside.extractor}, each followed by its nearest. Median distance of generated images to the "
        f"nearest training image: {beside.generated:.3g}"
    )
    if beside.heldout is not None:
        said += f"; of real images that were held out: {beside.heldout:.3g}. Copies would be far nearer than those"
    return joined([element("p", f"{said}."), _tiles(beside.nearest, budget)])


def _classes(model: Model, beside: samples.Beside, compared: int, budget: int) -> Html:
    if not beside.classes:
        least = samples.LEAST_PER_CLASS
        said = (
            f"{compared:,} images are fewer than {least} of each class, which would be noise: ask for more (--samples)."
        )
        return element("p", said)
    figures = beside.classes
    many = len(figures) > 2 * SHOWN_CLASSES
    shown = [*figures[:SHOWN_CLASSES], *figures[-SHOWN_CLASSES:]] if many else figures
    rows = []
    for one in shown:
        images = model.sample([one.index], PER_CLASS, SEED)
        name = samples.class_name(model, one.index)
        row = page.tiles("", images, [f"generated {name}"] * PER_CLASS, budget, shown=False)
        rows.append([name, one.generated, one.accuracy, one.distance, one.frechet, row])
    said = (
        f"Worst first, under {beside.extractor}: by the share of images it takes for their class, then by the distance"
    )
    said += " between the means of generated and of real features, less what so few images differ by chance."
    refused = [one for one in figures if one.frechet is None]
    if refused:
        most = max(min(one.generated, one.real) for one in refused)
        said += (
            f" The Fréchet distance of {len(refused)} of {len(figures)} classes is left out: with "
            f"{beside.features:,} features it is noise below {metrics.least_images(beside.features):,} generated and "
            f"as many real images of a class, and here are at most {most:,}."
        )
    head = ["class", "images", "class accuracy", "distance of means", "Fréchet distance", "samples"]
    caption = f"the {SHOWN_CLASSES} worst and the {SHOWN_CLASSES} best of {len(figures)} classes" if many else "classes"
    return joined([element("p", said), page.table(head, rows, caption)])


# --- attention -------------------------------------------------------------------------------------------------------


def _attention(subjects: Sequence[Subject]) -> Section:
    columns = [(subject.name, _explored(subject, EXPLORER_BYTES // len(subjects))) for subject in subjects]
    return Section("Attention", page.side_by_side(columns))


def _explored(subject: Subject, budget: int) -> Html:
    model = subject.model
    if not model.config.attention_sizes:
        return element("p", "The networks have no self-attention.")
    z, y = latents(SEED, Purpose.SAMPLE_Z, range(EXPLORED), model.config.z_dim), model.labels(None, EXPLORED)
    layers, images = attention.of_generator(model, z, y), model.generate(z, y)
    if subject.discriminator is None:
        said = "The generator's layers as they make the image; the discriminator is not at hand."
    else:
        said = "The generator's layers as they make the image, the discriminator's as it looks at it."
        layers += attention.of_discriminator(subject.discriminator, images, y)
    return joined([element("p", said), explorer.explorer(layers, images.cpu(), samples.names(model, EXPLORED), budget)])


def _runs(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Run]]:
    return ((subject, subject.run) for subject in subjects if subject.run is not None)
