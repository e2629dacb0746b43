"""The bundled sample of reviews."""

from tests.sdprune.samples.conftest import reviews_file

__all__ = ["reviews_file"]
