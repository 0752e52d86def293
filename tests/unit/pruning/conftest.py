from tests.unit.evaluation.conftest import model

__all__ = ["model"]
