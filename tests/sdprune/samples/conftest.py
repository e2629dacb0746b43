"""The bundled sample, fetched once into the user's cache; what needs it is skipped where it cannot be fetched."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sdprune.samples.archive import SampleUnavailable
from sdprune.samples.english import sample_model, sample_reviews


def _fetch_or_skip(fetch: Callable[[], Path]) -> Path:
    try:
        return fetch()
    except SampleUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return _fetch_or_skip(sample_model)


@pytest.fixture(scope="session")
def reviews_file() -> Path:
    return _fetch_or_skip(sample_reviews)
