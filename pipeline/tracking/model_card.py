"""The model card: the README.md of a registered model."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import printable
from pipeline.runs.score_protocol import Score
from sagan.trained_model import Model

_CARD = """# {name}

A Self-Attention GAN (Zhang et al. 2019) that generates {size}×{size} images{classes}.

![samples](samples.png)

## Score

{score}

## Sampling

The model needs `torch`, `numpy` and `safetensors`. The example also needs `pillow`, to write the images. Nothing else
of the training system is needed. Run this in the model's folder:

```python
import sys

sys.path.insert(0, "code")
import sagan
from PIL import Image

model = sagan.load(".")
images = model.sample(classes={example}, n=16, seed=0, truncation=1.0)  # uint8 [16, 3, {size}, {size}]
for i, image in enumerate(images):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"sample-{{i:02d}}.png")
```

`generator.safetensors` holds {weights}, divided by their spectral norms, with {batch_norm}.
With a `truncation` below 1, images are more typical and less varied.

## Training

{training}

## Licence

The code in `code/` is under Apache-2.0. The terms for the weights and the samples depend on the training images. Ask
the person who chose these images.
"""


def model_card(name: str, model: Model, score: Score | None, training: dict[str, Any]) -> str:
    """Return the card in Markdown. `training` holds facts about the training by name. Imported models have no score."""
    names = model.class_names
    classes = f" of {model.config.known_num_classes} classes" if model.config.known_num_classes else ""
    if names:
        shown = ", ".join(_code(printable(name)[:80]) for name in names[:10])
        classes += f" ({shown}{', …' if len(names) > 10 else ''})"
    return _CARD.format(
        name=name,
        size=model.config.known_resolution,
        classes=classes,
        weights=_WEIGHTS[model.weights],
        batch_norm=_batch_norm(model.batch_norm),
        example=repr(names[:1]) if names else "None",
        score=_NO_SCORE if score is None else _score(score),
        training=_table(training),
    )


_NO_SCORE = "Nobody has scored this model yet. `sagan evaluate FOLDER --reference COLLECTION` does."


def _score(score: Score) -> str:
    """Return the value and the protocol of a score."""
    return (
        f"**{score.metric} = {score.value:.4g}**\n\n"
        "Two scores can be compared only if all of these values are equal:\n\n"
        + _table({"id": score.protocol.id8, **score.protocol.to_dict()})
    )


_WEIGHTS = {"ema": "the exponential moving average of the generator's weights", "raw": "the generator's raw weights"}


def _batch_norm(statistics: str) -> str:
    """Return a clause that describes `statistics`, a value of `Model.batch_norm`."""
    if statistics == "running":
        return "the running averages of training as batch-norm statistics"
    return f"batch-norm statistics computed over {statistics.removeprefix('standing ')} samples of these weights"


def _code(text: str) -> str:
    """Return a foreign text as a code span of Markdown. Nothing in it becomes a link, a heading or HTML."""
    text = printable(text.replace("\n", " ").replace("\t", " "))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _table(facts: dict[str, Any]) -> str:
    """Return a Markdown table with a row per fact."""
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


# What Markdown or GitHub may take for more than plain text, such as emphasis, HTML or the address of a page
_NOT_PLAIN = re.compile(r"[^\w .,:;/+-]|\b_|_\b|://|www\.", re.IGNORECASE)


def _cell(value: Any) -> str:
    """Return a value as the content of a cell. Names of the classes of foreign models may be in it."""
    text = str(value)
    return _code(text).replace("|", "\\|") if _NOT_PLAIN.search(text) else text
