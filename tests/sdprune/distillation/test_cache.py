"""The teacher's outputs are computed once, found again, and never taken for those of something else."""

import json

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from sdprune.data.examples import EncodedExamples
from sdprune.distillation.cache import INDEX_NAME, POSITIONS, TeacherCache, example_keys, model_hash
from sdprune.distillation.features import token_mask
from sdprune.distillation.teacher import Teacher

NAMES = ("logits", "first", "mean@1", "tokens")


@pytest.fixture
def make(tmp_path, model_factory, dataset_factory, tokenizer):
    def make(folder="cache", seed=0, names=NAMES, dataset=None, limit=1e9, precision="fp32", dtype=None):
        teacher = Teacher(model_factory(seed), copy_model=True, dtype=dtype)
        dataset = dataset_factory(40) if dataset is None else dataset
        collate = DataCollatorWithPadding(tokenizer)
        runs = []

        def run(batch):
            runs.append(len(batch["input_ids"]))
            return teacher(batch, names)

        cache = TeacherCache(
            tmp_path / folder, teacher.model, names, dataset, collate, run, precision=precision, limit=limit
        )
        cache.runs, cache.teacher = runs, teacher
        return cache

    return make


def read(cache, rows):
    batch = cache.collate([cache.dataset[row] for row in rows])
    positions = batch.pop(POSITIONS)
    return dict(batch), cache(positions, batch["input_ids"].shape[1], torch.device("cpu"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_the_teacher_says(make, dtype):
    cache = make(dtype=dtype)
    assert not cache.filled
    assert not cache.folder.exists()
    cache.open_or_fill(7)
    assert cache.filled
    for again in (cache, make(dtype=dtype)):
        for rows in ([3, 17, 0, 39], [5], [8, 8, 21]):  # other batches, other padding
            batch, found = read(again, rows)
            expected = cache.teacher(batch, NAMES)
            mask = token_mask(batch, cache.teacher.model)
            for name in NAMES:
                kept = (found[name], expected[name])
                assert kept[0].dtype == kept[1].dtype == (dtype or torch.float32)
                if name == "tokens":
                    assert (found[name][~mask] == 0).all()
                    kept = tuple(value[mask] for value in kept)
                tolerance = 1e-6 if dtype is None else 3e-2
                torch.testing.assert_close(*kept, rtol=tolerance, atol=tolerance)


def test_every_example_is_computed_once(make, dataset_factory):
    dataset = dataset_factory(40)
    columns = {name: rows + rows for name, rows in dataset.columns.items()}
    cache = make(dataset=EncodedExamples(columns, list(dataset.labels) * 2))
    cache.open_or_fill(16)
    unique = len({tuple(row) for row in dataset.columns["input_ids"]})
    assert sum(cache.runs) == unique + 1  # one to learn the shapes
    warm = make(dataset=dataset)  # the same examples, however often they come
    warm.open_or_fill(16)
    assert sum(warm.runs) == 1
    subset = make(dataset=dataset, names=("mean@1",))
    assert subset.filled
    assert set(read(subset, [1, 2])[1]) == {"mean@1"}


def test_keys_know_content_alone(dataset_factory, tokenizer):
    dataset = dataset_factory(12)
    collate = DataCollatorWithPadding(tokenizer)
    rows = [dataset[index] for index in range(12)]
    together = example_keys(collate(rows))
    assert together == [example_keys(collate([row]))[0] for row in rows]
    assert together == example_keys(collate([row | {"labels": 1 - row["labels"]} for row in rows]))
    changed = rows[0] | {"token_type_ids": [1 for _ in rows[0]["input_ids"]]}
    assert example_keys(collate([changed]))[0] != together[0]
    batch = collate(rows)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="teacher_cache needs padding on the right"):
        example_keys(batch)
    batch = collate(rows)
    batch["attention_mask"][:, 1] = 0  # kept tokens alone would be taken for the first ones
    with pytest.raises(ValueError, match=r"no tokens inside a row out of attention_mask, here of shape \(12, \d+\)"):
        example_keys(batch)


def test_the_hash_of_a_model_is_that_of_its_weights(model_factory, tmp_path):
    first = model_factory()
    first.save_pretrained(tmp_path)
    assert model_hash(first) == model_hash(type(first).from_pretrained(tmp_path))
    assert model_hash(first) != model_hash(model_factory(1))
    with torch.no_grad():
        first.classifier.bias[0] += 1e-3
    assert model_hash(first) != model_hash(model_factory())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"belongs to another teacher \(\w{16} instead of \w{16}\); name another folder, or remove it"),
        ({"precision": "bf16"}, r"was made in another precision \(fp32 instead of bf16\)"),
        ({"names": ("pooled",)}, "holds logits, first, mean@1, tokens, not pooled"),
        ({"dataset": 44}, "belongs to another data set: of its 40 examples 40 are among the 44 of this one"),
        ({"dataset": 36}, "belongs to another data set: of its 40 examples 36 are among the 36 of this one"),
    ],
    ids=str,
)
def test_another_cache_is_rejected_with_the_reason(make, dataset_factory, changes, message):
    make().open_or_fill(16)
    if "dataset" in changes:
        changes = {"dataset": dataset_factory(changes["dataset"])}
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_damage_is_found(make, tmp_path):
    make().open_or_fill(16)
    data = np.load(tmp_path / "cache" / "first.npy", mmap_mode="r+")
    data[3, 2] += 1
    data.flush()
    del data
    with pytest.raises(ValueError, match=r"is damaged: first\.npy is missing or not what was written"):
        make()
    (tmp_path / "cache" / INDEX_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"is damaged: index\.json cannot be read"):
        make()
    (tmp_path / "cache" / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match=r"holds no cache \(index\.json is missing\), but other files"):
        make()


def test_the_size_is_known_before_anything_runs(make, tmp_path, dataset_factory):
    tokens = sum(dataset_factory(40).lengths)
    size = 4 * (40 * (2 + 32 + 32) + tokens * 32)
    with pytest.raises(
        ValueError, match=rf"teacher_cache would take {size / 1e9:.3g} GB .*of 40 examples\), more than"
    ):
        make(limit=size - 1)
    cache = make(limit=size)
    cache.open_or_fill(16)
    stored = sum(np.load(path, mmap_mode="r").nbytes for path in (tmp_path / "cache").glob("*.npy"))
    assert stored == size + 40 * (16 + 8)  # keys and lengths
    assert json.loads((tmp_path / "cache" / INDEX_NAME).read_text())["features"]["first"] == "float32"


def test_an_interruption_leaves_nothing_behind(make, tmp_path):
    cache = make()
    cache._run = lambda batch: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.open_or_fill(16)
    assert list(tmp_path.iterdir()) == []


def test_examples_that_change_are_refused(make):
    cache = make()
    cache.open_or_fill(16)
    row = cache.dataset[0]
    with pytest.raises(ValueError, match="an example gives other inputs now than when the data set was read"):
        cache.collate([row | {"input_ids": row["input_ids"][::-1]}])
