"""The MLflow model of a generator. Each registered model contains a copy of this file, which imports no pipeline code.

`predict(DataFrame[class, seed, truncation]) → DataFrame[png, class]`. The column `png` is base64. Every input column is
optional.
"""

import base64
import io
import math
import numbers
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException

MOST_ROWS = 1024
MOST_TRUNCATION = 10.0
BATCH = 64  # images of one forward pass


class Generator(mlflow.pyfunc.PythonModel):
    """The generator in the folder of this file. It is loaded with the copy of `sagan` in `code/`."""

    def load_context(self, context: Any) -> None:
        """Load the generator. MLflow calls this once."""
        import sagan

        self.model = sagan.load(Path(__file__).parent)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Generate one image per row of `model_input`, which has 1 to 1 024 rows.

        Columns of a row:
            class: Name or number of the class. Default: all classes in turn.
            seed: Seed of the latent, 0 to 2**63 − 1. Default: the number of the row.
            truncation: Factor of the latent, above 0 and at most 10. Default: 1.

        Raises MlflowException with INVALID_PARAMETER_VALUE, which names the row, where a value is something else.
        """
        import torch
        from PIL import Image

        from sagan.random import Purpose, draw_latents

        if not 1 <= len(model_input) <= MOST_ROWS:
            raise _refused(f"the input has {len(model_input)} rows; send 1 to {MOST_ROWS} rows")
        unknown = [str(name) for name in model_input.columns if name not in ("class", "seed", "truncation")]
        if unknown:
            raise _refused(f"unknown columns {_shown(unknown)}; the columns are class, seed and truncation")
        config = self.model.config
        latents: list[Any] = []
        labels: list[int] = []
        columns = {str(name): model_input[name].tolist() for name in model_input.columns}
        for i in range(len(model_input)):
            row = {name: values[i] for name, values in columns.items() if not _missing(values[i])}
            seed = _integer(row.get("seed", i), f"row {i}: seed")
            if not 0 <= seed < 2**63:
                raise _refused(f"row {i}: seed is {_shown(seed)}; it must be from 0 to 2**63 - 1")
            truncation = _truncation(row.get("truncation", 1.0), f"row {i}: truncation")
            latents.append(truncation * draw_latents(seed, Purpose.SAMPLE_Z, range(1), config.z_dim))
            labels.append(self._label(row.get("class"), i))
        rows = []
        for start in range(0, len(latents), BATCH):
            of_batch = labels[start : start + BATCH]
            y = torch.tensor(of_batch) if config.known_num_classes else None
            images = self.model.generate(torch.cat(latents[start : start + BATCH]), y)
            for image, label in zip(images, of_batch, strict=True):
                file = io.BytesIO()
                Image.fromarray(image.cpu().permute(1, 2, 0).numpy()).save(file, "PNG")
                rows.append({"png": base64.b64encode(file.getvalue()).decode(), "class": self._name(label)})
        return pd.DataFrame(rows, columns=["png", "class"])

    def _label(self, value: Any, i: int) -> int:
        """Return the label of row i; 0 where the model has no classes. Raises MlflowException."""
        count, names = self.model.config.known_num_classes, self.model.class_names
        if not count:
            if value is not None:
                raise _refused(f"row {i}: this model was trained without classes; leave class out")
            return 0
        if value is None:
            return i % count
        if isinstance(value, str) and value in names:
            return int(names.index(value))
        known = f"the model has classes 0 to {count - 1}" + (f": {_shown(names[:10])}" if names else "")
        if isinstance(value, str) and not (value.isascii() and value.isdigit() and len(value) < 10):
            raise _refused(f"row {i}: the model has no class {_shown(value)}; {known}")
        label = int(value) if isinstance(value, str) else _integer(value, f"row {i}: class")
        if not 0 <= label < count:
            raise _refused(f"row {i}: the model has no class {_shown(label)}; {known}")
        return label

    def _name(self, label: int) -> str:
        """Return the name of the class, its number where classes have no names, or "" where there are no classes."""
        if not self.model.config.known_num_classes:
            return ""
        return self.model.class_names[label] if self.model.class_names else str(label)


def _missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or the NaN that pandas writes into gaps."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA


def _integer(value: Any, what: str) -> int:
    """Return an exact integer. A whole float is one, since pandas turns integers beside a gap into floats."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or whole):
        raise _refused(f"{what} is {_shown(value)}; it must be an integer")
    return int(value)


def _truncation(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= MOST_TRUNCATION:
        raise _refused(f"{what} is {_shown(value)}; it must be a number above 0 and at most {MOST_TRUNCATION:g}")
    return float(value)


def _shown(value: Any) -> str:
    """Return a value as a short printable text."""
    try:
        text = ascii(value)
    except ValueError:  # Python does not print integers with thousands of digits
        return "a huge number"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _refused(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(reason)


mlflow.models.set_model(Generator())
