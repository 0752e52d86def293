"""The model card that a registered model carries as README.md."""

from __future__ import annotations

from typing import Any

from sagan.sampling import Model

_CARD = """# {name}

A Self-Attention GAN (Zhang et al. 2019) that makes {size}×{size} images{classes}.

![samples](samples.png)

## Score

{score}

Scores compare only where all of this is equal:

{protocol}

## Sampling

Needs `torch`, `numpy`, `safetensors` and, for the picture, `pillow`; nothing else of the system that trained it.
Run this in the model's folder:

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

`generator.safetensors` holds an exponential moving average of the generator, its weights divided by their spectral
norms, with batch-norm statistics taken on these very weights. Below 1, `truncation` makes images more typical and less
varied.

## Training

{training}

## Licence

The code in `code/` is under Apache-2.0. What may be done with the weights and the samples depends on the images that
the model was trained on, which is for whoever chose them to say.
"""


def card(name: str, model: Model, score: dict[str, Any], training: dict[str, Any]) -> str:
    """Markdown. `score` has key, value and protocol; `training` holds facts by name."""
    names = model.class_names
    classes = f" of {model.config.labels} classes" if model.config.labels else ""
    if names:
        classes += f" ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
    return _CARD.format(
        name=name,
        size=model.config.size,
        classes=classes,
        example=repr(names[:1]) if names else "None",
        score=f"**{score['key']} = {score['value']:.4g}**",
        protocol=_table(score["protocol"]),
        training=_table(training),
    )


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
