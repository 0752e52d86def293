"""Writes an HTML page about a run, a model, a sweep or a study, or about two side by side. It loads no other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError, SaganError, UsageError
from pipeline.evaluation import metrics
from pipeline.report import attention_maps, attention_section, plots, sample_analysis
from pipeline.report import html_elements as html
from pipeline.report.html_elements import Html, Section, element, joined
from pipeline.report.runs_and_models import Reader, RunOfPage, Subject, Subjects
from pipeline.report.stored_picture import stored_picture
from pipeline.runs.json_records import RecordedInit, StudySummary, SweepSummary
from pipeline.runs.score_protocol import Score
from pipeline.runs.spending import shown_amount
from pipeline.runs.stored_run import StoredStudy, StoredSweep
from pipeline.storage import files
from pipeline.study import show_tables
from pipeline.tracking.init_source import location
from pipeline.tuning.sweep import best_first
from sagan.random import Purpose, draw_latents
from sagan.trained_model import Model

EXPLORED = 6  # largest number of images in the attention explorer
FRAMES, FRAME_WIDTH = 6, 960  # number of sample grids over training, and their width in pixels
PLANE_WIDTH = 1024  # largest width of the picture of a sweep or a study
ROWS, STEPS = 4, 8  # rows and columns of an interpolation
SHOWN_CLASSES = 5  # number of the worst classes and of the best classes in the table
PER_CLASS = 4  # samples of each class in the table
SHOWN_LINES = 4  # lines about what a run took from its start, or did not take
SEED = 0

# Largest number of bytes of the page, and of its parts, over all subjects. The rest is for text and tables.
PAGE_BYTES = 5_000_000
EXPLORER_BYTES, FRAME_BYTES, TILE_BYTES, PLANE_BYTES = 3_200_000, 900_000, 650_000, 50_000
TILES = 2 * ROWS * STEPS + ROWS * (1 + sample_analysis.NEIGHBOURS) + 2 * SHOWN_CLASSES * PER_CLASS  # per subject


def write_report(urls: Sequence[str], out: Path, compared: int = 2000, reader: Reader = Reader()) -> int:  # noqa: B008
    """Write the page and return its size in bytes.

    Args:
        urls: One or two subjects, as `Subjects.add` accepts them.
        out: File to write.
        compared: Number of generated images that are compared with as many real images.
        reader: Files and folders of the person who reads the runs.

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    subjects = Subjects()
    for url in urls:
        subjects.add(url)
    columns = subjects.columns
    sections = [
        *(_sweep(sweep) for sweep in subjects.sweeps),
        *(_study(study) for study in subjects.studies),
        _summary(columns),
        _scores(columns),
        _samples(columns),
        _attention(columns),
        _interpolation(columns),
        *_real_comparison(columns, compared, reader),
        _protocols(columns),
        _method(columns),
    ]
    several = [*(sweep.name for sweep in subjects.sweeps), *(study.name for study in subjects.studies)]
    title = " and ".join(several or [column.name for column in columns])
    out.parent.mkdir(parents=True, exist_ok=True)
    page = html.whole(title, sections)
    return out.write_bytes(page.encode(errors="backslashreplace"))  # a foreign text may hold half a surrogate pair


# --- figures ---------------------------------------------------------------------------------------------------------


def _sweep(sweep: StoredSweep) -> Section:
    """Return the picture of the sweep and a table of its trials."""
    summary, record = sweep.summary(), sweep.trials()
    if summary is None or summary.score is None or record is None:
        raise CorruptError(f"{sweep.url} lacks the scores or the trials of its sweep", "run the sweep again")
    metric = summary.score.metric
    space = list(summary.best.point)
    trials = best_first(record.trials, summary.score.higher_is_better)
    rows = [
        [trial.name, *(trial.point.get(key) for key in space), trial.score, trial.kimg, trial.outcome]
        for trial in trials
    ]
    columns = ["trial", *space, metric, "kimg", "outcome"]
    if any(trial.parent for trial in trials):
        columns += ["clone of", "since generation"]
        parents = [trial.parent for trial in trials]
        rows = [
            [*row, *([parent.run, parent.generation] if parent else [None, 0])]
            for row, parent in zip(rows, parents, strict=True)
        ]
    alt = f"{metric} of every trial over {' and '.join(space)}"
    picture = html.picture(stored_picture(sweep.picture_url, PLANE_WIDTH), alt, PLANE_BYTES, class_="plane")
    text = (
        f"The sweep ran {summary.trials} trials. {summary.stopped_early} of them were stopped early. "
        f"{_spent(summary)} The best trial, {summary.best.name}, is shown below."
    )
    table = html.table(columns, rows, "trials, the best first")
    return Section(f"Sweep {summary.name}", joined([element("p", text), picture, table]))


def _study(study: StoredStudy) -> Section:
    """Return the tables of the study, with what a reader must know about them, and its picture."""
    summary, record = study.summary(), study.tables()
    if summary is None or record is None:
        raise CorruptError(f"{study.url} lacks the tables of its study", "run the study again")
    text = f"The study has {summary.runs} runs. {summary.diverged} of them diverged. {_spent(summary)}"
    content = [element("p", text)]
    for row, point in summary.tuned.items():
        values = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
        )
        content.append(element("p", f"A sweep chose for the row {row}: {values}."))
    for table in record.tables:
        rows = [show_tables.cells(row) for row in table.rows]
        content.append(html.table(show_tables.head(table), rows, f"{table.key}, by row"))
        content += [element("p", note) for note in show_tables.notes(table)]
    alt = "score of every row over the length of its runs"
    content.append(html.picture(stored_picture(study.picture_url, PLANE_WIDTH), alt, PLANE_BYTES, class_="plane"))
    if summary.shown:
        content.append(element("p", f"Below is {summary.shown}, a run of the reference row."))
    return Section(f"Study {summary.name}", joined(content))


def _spent(summary: SweepSummary | StudySummary) -> str:
    """Return what the runs of a sweep or a study have spent, as a sentence."""
    cost = "" if summary.cost is None else f", which cost {shown_amount(summary.cost)}"
    return f"The runs held {shown_amount(summary.device_hours)} device hours{cost}."


def _summary(subjects: Sequence[Subject]) -> Section:
    """Return a table of figures with a column for each subject."""
    facts = [_facts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [[name, *(fact.get(name) for fact in facts)] for name in names]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    return Section("Summary", html.table(["", *(s.name for s in subjects)], rows, "figures of the run"))


def _facts(subject: Subject) -> dict[str, object]:
    config = subject.model.config
    facts: dict[str, object] = {
        "resolution": f"{config.known_resolution} × {config.known_resolution}",
        "classes": config.known_num_classes or "none",
        "attention": ", ".join(f"{size}²" for size in config.attention_sizes) if config.has_attention else "none",
    }
    if subject.run is None:
        return facts
    run, summary = subject.run, subject.run.summary
    facts |= {
        "trained": f"{summary.images / 1000:g} kimg" if summary else "not ended yet",
        "checkpoint shown": run.checkpoint.name,
        "commit": run.git_commit,
        **(_start(run.record.init) if run.record.init else {}),
        **(run.spending.rows() if run.spending else {}),
    }
    if summary is not None:
        registered = summary.registered
        facts |= {
            "images per second": summary.images_per_s,
            "score": _score(summary.score),
            "final score (other latents)": _score(summary.final),
            "class accuracy": summary.class_accuracy,
            "registered": f"models:/{registered.model}/{registered.version}" if registered else None,
            "alias": registered.alias if registered else None,
            "restarts": summary.restarts,
            "images lost": summary.images_lost,
        }
    return facts | {name.replace("_", " "): value for name, value in run.logged.items() if name.startswith(_SHOWN)}


_SHOWN = ("loss", "gamma")


def _start(init: RecordedInit) -> dict[str, object]:
    """Return what a run started from, and in short what it took and did not take."""
    return {
        "started from": location(init.source, init.version),
        "SHA-256 of the start": init.sha256[:8],
        "taken": _shortened(init.taken),
        "not taken": _shortened(init.skipped),
    }


def _shortened(lines: Sequence[str]) -> str | None:
    """Return the first lines and the number of the others; None without lines."""
    more = f"; and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return "; ".join(lines[:SHOWN_LINES]) + more if lines else None


def _score(score: Score | None) -> str | None:
    if score is None or score.value is None:
        return None
    deviation = "" if score.deviation is None else f" ± {score.deviation:.2g}"
    return f"{score.key} = {score.value:.4g}{deviation}"


def _scores(subjects: Sequence[Subject]) -> Section:
    """Return a plot for each metric and protocol. Two runs are in one plot only if metric and protocol are equal."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    directions: dict[str, bool] = {}
    for subject, run in _runs(subjects):
        for record in run.scores:
            score = record.score
            if score.value is not None:
                directions[score.key] = score.higher_is_better
                line = lines.setdefault(score.key, {}).setdefault(subject.name, [])
                line.append((record.images / 1000, score.value))
    shown = []
    for key, of_runs in lines.items():
        shown.append(plots.curve(of_runs, "kimg", key))
        better, direction = (max, "higher") if directions[key] else (min, "lower")
        best = {name: better(line, key=lambda point: point[1]) for name, line in of_runs.items()}
        text = "; ".join(f"{name}: best {value:.4g} at {kimg:g} kimg" for name, (kimg, value) in best.items())
        shown.append(element("p", text, f"; {direction} is better."))
    scored = {name for of_runs in lines.values() for name in of_runs}
    if len(scored) > 1 and not any(len(of_runs) > 1 for of_runs in lines.values()):
        shown.insert(0, element("p", NOT_COMPARED, class_="warning"))
    return Section("Scores", joined(shown))


NOT_COMPARED = "These runs were scored under different protocols. Their scores cannot be compared."


def _protocols(subjects: Sequence[Subject]) -> Section:
    """Return a table with a column for each protocol. Values that differ are marked."""
    protocols: dict[str, dict[str, Any]] = {}
    used: dict[str, list[str]] = {}
    for subject, run in _runs(subjects):
        ranked = {record.score.protocol.id8 for record in run.scores}
        for id8, protocol in run.protocols.items():
            protocols[id8] = protocol.to_dict()
            used.setdefault(id8, []).append(f"{subject.name}, {'ranking' if id8 in ranked else 'final'}")
    if not protocols:
        return Section("Protocols", Html())
    text = "Two scores can be compared only if all values of their protocols are equal. Values that differ are marked."
    uses: list[object] = ["used for", *(" · ".join(used[id8]) for id8 in protocols)]
    rows = [uses, *_compared_rows(list(protocols.values()))]
    return Section("Protocols", joined([element("p", text), html.table(["", *protocols], rows, "protocols by id")]))


def _compared_rows(columns: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return a row for each key of the columns. Values that differ are marked."""
    rows: list[list[object]] = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key) for column in columns]
        differs = any(value != values[0] for value in values)
        rows.append([key, *(element("mark", value) if differs else value for value in values)])
    return rows


def _method(subjects: Sequence[Subject]) -> Section:
    """Return a table of the methods with a column for each run."""
    methods = {subject.name: run.record.method for subject, run in _runs(subjects)}
    if not methods:
        return Section("Method", Html())
    text = "All values that decide the numbers of a run." + (
        " Values that differ are marked." if len(methods) > 1 else ""
    )
    rows = _compared_rows(list(methods.values()))
    details = element("details", element("summary", text), html.table(["", *methods], rows, "method by key"))
    return Section("Method", details)


# --- images ----------------------------------------------------------------------------------------------------------


def _samples(subjects: Sequence[Subject]) -> Section:
    frames, budget = FRAMES // len(subjects), _tile_budget(subjects)
    columns = [(s.name, _flipbook(s.run, frames) if s.run else _plain(s.model, budget)) for s in subjects]
    return Section("Samples", html.side_by_side(columns))


def _tile_budget(subjects: Sequence[Subject]) -> int:
    """Return the largest number of bytes of one tile."""
    return TILE_BYTES // TILES // len(subjects)


def _flipbook(run: RunOfPage, frames: int) -> Html:
    """Return at most `frames` sample grids of the same latents over training. Without scripts, the last is shown."""
    scored = [record for record in run.scores if files.exists(run.stored.grid_url(record.checkpoint))]
    if not scored:
        return element("p", "No checkpoint has a sample grid yet.")
    last = len(scored) - 1
    chosen = sorted({round(i * last / max(1, frames - 1)) for i in range(frames)} | {last})
    pictures = []
    for i in chosen:
        record = scored[i]
        small = stored_picture(run.stored.grid_url(record.checkpoint), FRAME_WIDTH)
        value = "no score" if record.score.value is None else f"{record.score.metric} {record.score.value:.4g}"
        caption = f"{record.images / 1000:g} kimg, {value}"
        alt = f"samples and real images: {caption}"
        pictures.append(html.picture(small, alt, FRAME_BYTES // FRAMES, data_caption=caption, hidden=i != last))
    content = element("div", *pictures, class_="frames", tabindex=0, role="group", aria_label="sample grid")
    return element("div", content, class_="flipbook")


def _plain(model: Model, budget: int) -> Html:
    """Return samples of a model without a run."""
    rows = 2
    names = sample_analysis.names(model, rows * STEPS)
    images = model.sample(n=rows * STEPS, seed=SEED).cpu().split(STEPS)
    return _tiles(
        [sample_analysis.Row("", part, names[row * STEPS :][:STEPS]) for row, part in enumerate(images)], budget
    )


def _interpolation(subjects: Sequence[Subject]) -> Section:
    columns, budget = [], _tile_budget(subjects)
    for subject in subjects:
        rows = sample_analysis.between_latents(subject.model, ROWS, STEPS, SEED)
        of_classes = sample_analysis.between_classes(subject.model, ROWS, STEPS, SEED)
        text = "Each row moves from one latent to another. The class is fixed."
        content = [element("p", text), _tiles(rows, budget, show_captions=False)]
        if of_classes:
            content.append(element("p", "Each row moves from one class to the next. The latent is fixed."))
            content.append(_tiles(of_classes, budget, show_captions=False))
        columns.append((subject.name, joined(content)))
    return Section("Interpolation", html.side_by_side(columns))


def _tiles(rows: Sequence[sample_analysis.Row], budget: int, *, show_captions: bool = True) -> Html:
    return joined(html.tiles(row.title, row.images, row.captions, budget, show_captions=show_captions) for row in rows)


def _real_comparison(subjects: Sequence[Subject], compared: int, reader: Reader) -> list[Section]:
    """Return the sections that compare samples with real images. A comparison that fails is replaced by its message."""
    nearest, classes, budget = [], [], _tile_budget(subjects)
    for subject, run in _runs(subjects):
        try:
            comparison = _compare(subject.model, run, compared, reader)
        except SaganError as error:
            text = f"The comparison with real images is left out: {error.message}. {error.remedy}"
            nearest.append((subject.name, element("p", text, class_="warning")))
        else:
            nearest.append((subject.name, _nearest(comparison, compared, budget)))
            if subject.model.config.known_num_classes:
                classes.append((subject.name, _classes(subject.model, comparison, compared, budget)))
    return [
        Section("Nearest real images", html.side_by_side(nearest)),
        Section("Classes", html.side_by_side(classes)),
    ]


def _compare(model: Model, run: RunOfPage, compared: int, reader: Reader) -> sample_analysis.RealComparison:
    """Compare samples with the training images of the run.

    Raises UsageError where the run's URL holds another collection, EnvironmentFault, CorruptError.
    """
    data, section = reader.data_of(run.record), reader.section_of(run.record)
    collection = Collection.open(data.train)
    if collection.digest != run.record.method.get("data.collection"):
        raise UsageError(f"{data.train} now holds another collection than the one that the run was trained on")
    return sample_analysis.compare_with_real(model, collection, data, section, compared, ROWS)


def _nearest(comparison: sample_analysis.RealComparison, compared: int, budget: int) -> Html:
    """Return the generated images that are nearest to training images, beside these training images."""
    text = (
        "Each row shows a generated image and the training images nearest to it. The rows show the "
        f"{len(comparison.nearest)} of {compared:,} generated images that are nearest to one of "
        f"{comparison.training_images:,} training images. Distances are Euclidean, in the features of "
        f"{comparison.extractor}. The median distance of a generated image to the nearest training image is "
        f"{comparison.generated:.3g}."
    )
    if comparison.heldout is not None:
        text += (
            f" The median distance of a held-out real image to the nearest training image is {comparison.heldout:.3g}. "
            "Copies of training images would have far smaller distances than held-out images."
        )
    return joined([element("p", text), _tiles(comparison.nearest, budget)])


def _classes(model: Model, comparison: sample_analysis.RealComparison, compared: int, budget: int) -> Html:
    """Return a table of the classes. Of many classes, it shows the worst and the best."""
    if not comparison.classes:
        least = sample_analysis.LEAST_PER_CLASS
        text = (
            f"Among {compared:,} generated and as many real images, no class has {least} of both. With fewer images, "
            "figures of a class are noise. Compare more images with `sagan report --samples`."
        )
        return element("p", text)
    figures = comparison.classes
    many = len(figures) > 2 * SHOWN_CLASSES
    chosen = [*figures[:SHOWN_CLASSES], *figures[-SHOWN_CLASSES:]] if many else figures
    rows = []
    for one in chosen:
        images = model.sample([one.index], PER_CLASS, SEED)
        name = sample_analysis.class_name(model, one.index)
        row = html.tiles("", images, [f"generated {name}"] * PER_CLASS, budget, show_captions=False)
        rows.append([name, one.generated, one.accuracy, one.distance, one.frechet, row])
    text = (
        "The worst class comes first. Classes are sorted by class accuracy, then by the distance of means. Class "
        f"accuracy is the share of generated images that {comparison.extractor} assigns to their class. The distance "
        "of means is the distance between the mean features of generated and of real images. It is corrected for the "
        "part that is due to chance in so few images."
    )
    noisy = [one for one in figures if one.frechet is None]
    if noisy:
        most = max(min(one.generated, one.real) for one in noisy)
        text += (
            f" The Fréchet distance of {len(noisy)} of {len(figures)} classes is not shown. With "
            f"{comparison.features:,} features, it is noise for fewer than "
            f"{metrics.least_images_per_class(comparison.features):,} generated or real images of a class. These "
            f"classes have at most {most:,} of both."
        )
    head = ["class", "images", "class accuracy", "distance of means", "Fréchet distance", "samples"]
    caption = f"the {SHOWN_CLASSES} worst and the {SHOWN_CLASSES} best of {len(figures)} classes" if many else "classes"
    return joined([element("p", text), html.table(head, rows, caption)])


# --- attention -------------------------------------------------------------------------------------------------------


def _attention(subjects: Sequence[Subject]) -> Section:
    columns = [(subject.name, _explorer(subject, EXPLORER_BYTES // len(subjects))) for subject in subjects]
    return Section("Attention", html.side_by_side(columns))


def _explorer(subject: Subject, budget: int) -> Html:
    """Return the attention explorer of a subject in at most `budget` characters."""
    model = subject.model
    if not model.config.has_attention:
        return element("p", "The networks have no self-attention.")
    z, y = draw_latents(SEED, Purpose.SAMPLE_Z, range(EXPLORED), model.config.z_dim), model.labels_for(None, EXPLORED)
    layers, images = attention_maps.of_generator(model, z, y), model.generate(z, y)
    if subject.discriminator is None:
        text = (
            "The maps show the layers of the generator while it generates the image. This model has no discriminator."
        )
    else:
        text = (
            "The maps show the layers of the generator while it generates the image, and the layers of the "
            "discriminator while it processes the image."
        )
        layers += attention_maps.of_discriminator(subject.discriminator, images, y)
    return joined(
        [
            element("p", text),
            attention_section.explorer(layers, images.cpu(), sample_analysis.names(model, EXPLORED), budget),
        ]
    )


def _runs(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, RunOfPage]]:
    """Yield (subject, its run) of every subject that has a run."""
    return ((subject, subject.run) for subject in subjects if subject.run is not None)
