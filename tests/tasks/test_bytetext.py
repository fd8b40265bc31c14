"""Bytes as tokens: ids, the tokenizer that transformers loads, the text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from regard.tasks.bytetext import BOS, EOS, PAD, VOCAB, StandardLibrary, byte_tokenizer, decode, encode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(1024).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=80))
def test_every_text_comes_back_and_ids_are_its_bytes(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()] == [BOS, *encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text == decode(ids)


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    assert len(tokenizer) == VOCAB
    spelled = "a <|bos|> <|pad|> b"
    assert tokenizer(spelled)["input_ids"] == [BOS, *spelled.encode()]
    padded = tokenizer(["abc", "é"], padding=True, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[BOS, 97, 98, 99], [PAD, BOS, 195, 169]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert tokenizer.convert_ids_to_tokens([97, BOS]) == ["a", "<|bos|>"]


def test_decode_shows_broken_utf8():
    assert decode([BOS, 0xC3, 97, PAD]) == "�a"


def test_the_splits_of_the_text_are_disjoint_and_stable():
    train, test = StandardLibrary(), StandardLibrary("test")
    assert not set(train.files) & set(test.files)
    assert len(train.files) > 20 * len(test.files) > 0
    assert not any("test" in p.parts or "site-packages" in p.parts for p in train.files)
    windows = test.cut(5, 64, torch.Generator().manual_seed(0))
    assert windows.shape == (5, 64)
    assert (windows[:, 0] == BOS).all()
    assert all(bytes(w[1:].tolist()) in test.data.tobytes() for w in windows)
    assert torch.equal(windows, StandardLibrary("test").cut(5, 64, torch.Generator().manual_seed(0)))
    assert StandardLibrary("test").describe() == test.describe()
    with pytest.raises(ValueError, match="split"):
        StandardLibrary("dev")
