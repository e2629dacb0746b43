"""The named tasks: movie reviews from the package index, GLUE from a folder of the same columns."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdprune.data import tasks
from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig
from sdprune.runs.demo import majority_baseline, tfidf_baseline

GLUE = list(tasks._GLUE)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A repository with the columns and splits of GLUE, forty rows each."""
    import datasets
    import pandas

    folder = tmp_path_factory.mktemp("glue")
    card = ["---", "configs:"]
    for name in GLUE:
        task = tasks._GLUE[name]
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", task.test, "test"):
            rows: list[dict[str, Any]] = [
                {column: f"{split} {column} {row}" for column in task.text_columns} for row in range(40)
            ]
            for row, values in enumerate(rows):
                label = row % len(task.label_names) if task.label_names else row % 11 / 2
                values |= {"label": -1 if split == "test" else label, "idx": row}
            (folder / name).mkdir(exist_ok=True)
            pandas.DataFrame(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    yield str(folder)
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_tested_on_its_validation_rows(name, glue):
    task = tasks._load_glue(name, 0, repository=glue)
    columns = tasks._GLUE[name].text_columns
    split = "validation_matched" if name == "mnli" else "validation"
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 40)
    assert task.test.texts[3] == tuple(f"{split} {column} 3" for column in columns)
    held = {texts[0] for texts in task.validation.texts}
    assert all(text.startswith("train ") for text in held)
    assert not held & {texts[0] for texts in task.train.texts}
    assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
    assert {type(label) for label in task.test.labels} == {float if name == "stsb" else int}
    assert set(majority_baseline(task)) == set(task.metrics)
    assert task == tasks._load_glue(name, 0, repository=glue)


def test_glue_out_of_reach(tmp_path):
    with pytest.raises(OSError, match=r"GLUE task 'rte' could not be loaded from .*--data FILE") as raised:
        tasks._load_glue("rte", 0, repository=str(tmp_path / "absent"))
    assert "\n" not in str(raised.value)


def test_glue_without_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OSError, match=r"GLUE task 'sst2' could not be loaded .*datasets"):
        load_task(DataConfig(data="sst2"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst-2", "'sst-2' is neither a task nor a file; did you mean 'sst2'"),
        ("SST2", "did you mean 'sst2'"),
        ("movie_reviews", "did you mean 'movie-reviews'"),
        ("zzz", "neither a task nor a file. Tasks: movie-reviews, multilingual-reviews, cola"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataConfig(data=name))


@pytest.mark.parametrize("option", ["validation_data", "test_data", "text_pair_column", "group_column"])
def test_options_of_files_are_refused_for_tasks(option):
    with pytest.raises(ValueError, match=f"{option} belongs to data in files, but data is the task 'sst2'"):
        load_task(DataConfig(data="sst2", **{option: "x"}))


def test_importing_costs_no_heavy_package():
    code = (
        "import sys, torch, sdprune; before = set(sys.modules)\n"
        "import sdprune.data.tasks, sdprune.data.metrics, sdprune.data.sampler, sdprune.samples.english\n"
        "heavy = {'pandas', 'datasets', 'sklearn', 'scipy', 'transformers', 'pyarrow'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.network
def test_movie_reviews_are_split_by_movie(reviews_file: Path, monkeypatch):
    import pandas

    monkeypatch.setitem(sys.modules, "datasets", None)
    task = load_task(DataConfig())
    parts = (task.train, task.validation, task.test)
    frame = pandas.read_csv(reviews_file, keep_default_na=False).query("category != 'plot'")
    frame = frame.assign(text=frame.text.str.split().str.join(" ")).drop_duplicates("text").set_index("text")
    assert sum(map(len, parts)) == len(frame) == 12_752
    for part in parts:
        expected = frame.category.loc[[text for (text,) in part.texts]]
        assert [task.label_names[label] for label in part.labels] == expected.tolist()
    movies = [set(frame.movie_name.loc[[text for (text,) in part.texts]]) for part in parts]
    assert len(set.union(*movies)) == sum(map(len, movies)) == 507
    assert len(movies[2]) >= 507 / 4
    assert tuple(map(len, parts)) == (8552, 981, 3219)


@pytest.mark.network
def test_movie_reviews_need_more_than_a_guess(reviews_file: Path):
    task = load_task(DataConfig())
    guess, linear = majority_baseline(task), tfidf_baseline(task)
    assert guess["accuracy"] == pytest.approx(0.603, abs=0.001)
    assert linear["accuracy"] == pytest.approx(0.76, abs=0.01)
    assert linear["macro_f1"] > 2 * guess["macro_f1"] - 0.02


@pytest.mark.network
def test_fewer_movie_reviews(reviews_file: Path):
    task = load_task(DataConfig(max_train_samples=1500, max_eval_samples=100))
    assert tuple(map(len, (task.train, task.validation, task.test))) == (1500, 100, 100)
    assert sum(task.train.labels) / 1500 == pytest.approx(0.561, abs=0.002)
