"""How MLflow opens a registered model: this file travels with it and needs nothing of the training system.

`predict(DataFrame[class, seed, truncation]) → DataFrame[png, class]`; png is base64, all columns may be left out.
"""

import base64
import io
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]


class Generator(mlflow.pyfunc.PythonModel):
    """The generator beside this file, through the copy of `sagan` in code/."""

    def load_context(self, context: Any) -> None:
        import sagan

        self.model = sagan.load(Path(__file__).parent)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One image per row: of class `class` (name or number; default all in turn), from `seed`, truncated."""
        from PIL import Image

        rows = []
        for i, given in enumerate(model_input.to_dict("records")):
            row = {name: value for name, value in given.items() if not pd.isna(value)}
            classes = self.model.config.labels
            wanted = row.get("class", i % max(classes, 1))
            labels = [wanted if isinstance(wanted, str) else int(wanted)] if classes else None
            images = self.model.sample(labels, 1, int(row.get("seed", i)), float(row.get("truncation", 1.0)))
            file = io.BytesIO()
            Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "PNG")
            rows.append({"png": base64.b64encode(file.getvalue()).decode(), "class": self._name(labels)})
        return pd.DataFrame(rows, columns=["png", "class"])

    def _name(self, labels: list[Any] | None) -> str:
        indices = self.model.labels(labels, 1)
        if indices is None:
            return ""
        return self.model.class_names[int(indices)] if self.model.class_names else str(int(indices))


mlflow.models.set_model(Generator())
