"""The MLflow model of a generator. Each registered model contains a copy of this file, which imports no pipeline code.

`predict(DataFrame[class, seed, truncation]) → DataFrame[png, class]`. The column `png` is base64. Every input column is
optional.
"""

import base64
import io
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]


class Generator(mlflow.pyfunc.PythonModel):
    """The generator in the folder of this file. It is loaded with the copy of `sagan` in `code/`."""

    def load_context(self, context: Any) -> None:
        """Load the generator. MLflow calls this once."""
        import sagan

        self.model = sagan.load(Path(__file__).parent)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Generate one image per row of `model_input`.

        Columns of a row:
            class: Name or number of the class. Default: all classes in turn.
            seed: Seed of the latent. Default: the number of the row.
            truncation: Factor of the latent. Default: 1.
        """
        from PIL import Image

        rows = []
        for i, record in enumerate(model_input.to_dict("records")):
            row = {name: value for name, value in record.items() if not pd.isna(value)}
            classes = self.model.config.known_num_classes
            label = row.get("class", i % max(classes, 1))
            labels = [label if isinstance(label, str) else int(label)] if classes else None
            images = self.model.sample(labels, 1, int(row.get("seed", i)), float(row.get("truncation", 1.0)))
            file = io.BytesIO()
            Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "PNG")
            rows.append({"png": base64.b64encode(file.getvalue()).decode(), "class": self._name(labels)})
        return pd.DataFrame(rows, columns=["png", "class"])

    def _name(self, labels: list[Any] | None) -> str:
        """Return the name of the class, its number where classes have no names, or "" where there are no classes."""
        indices = self.model.labels_for(labels, 1)
        if indices is None:
            return ""
        return self.model.class_names[int(indices)] if self.model.class_names else str(int(indices))


mlflow.models.set_model(Generator())
