"""Corpora: any number of processes gives the same atlas, and a run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr

from regard.watch import corpus
from regard.watch.atlas import Atlas, AtlasError
from regard.watch.corpus import CorpusError, read_corpus, watch_corpus
from regard.watch.settings import Watch


class Letters:
    """A tokenizer of single bytes."""

    pad_token_id = 0

    def __call__(self, text, truncation=False, max_length=None):
        ids = [1, *text.encode()]
        return {"input_ids": ids[:max_length] if truncation else ids}

    def decode(self, ids):
        return bytes(i for i in ids if i > 1).decode(errors="replace")


def model() -> tr.LlamaForCausalLM:
    torch.manual_seed(0)
    return tr.LlamaForCausalLM(
        tr.LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


def texts(n: int = 11) -> list[str]:
    rng = random.Random(4)
    return ["".join(rng.choice("abc ") for _ in range(rng.randint(1, 40))) for _ in range(n)]


@pytest.fixture
def lines(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "id": f"doc {n}"}) + "\n" for n, t in enumerate(texts())))
    return path


RUN = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from tests.watch.test_corpus import Letters, model
    from regard.watch.corpus import watch_corpus

    def stop(done, of):
        if done == {die_at}:
            os._exit(9)

    watch_corpus(model(), Letters(), sys.argv[1], sys.argv[2], batch_size=4, resume={resume}, progress=stop)
"""


def run(folder: Path, lines: Path, out: Path, *, processes: int = 1, resume: bool = False, die_at: int = -1) -> int:
    script = folder / "run.py"
    tests = str(Path(__file__).parents[2])
    script.write_text(textwrap.dedent(RUN.format(tests=tests, resume=resume, die_at=die_at)))
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*start, str(script), str(lines), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
    ).returncode


def same(a: Atlas, b: Atlas) -> bool:
    return all(a[v].equals(b[v]) for v in a.data_vars) and set(a.data_vars) == set(b.data_vars) and a.sizes == b.sizes


def test_one_process_sees_every_text_once(lines, tmp_path):
    seen = []
    atlas = watch_corpus(
        model(), Letters(), lines, tmp_path / "a", batch_size=4, progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(n, 3) for n in range(1, 4)]
    assert atlas["sample"].values.tolist() == [f"doc {n}" for n in range(11)]
    assert atlas["n_tokens"].values.tolist() == [len(t) + 1 for t in texts()]
    assert (atlas["rows"].values == sum(len(t) + 1 for t in texts())).all()
    assert len(atlas.provenance) == 1
    assert atlas.provenance[0]["texts_cut"] == 0
    assert not (tmp_path / "a.parts").exists()
    assert same(Atlas.load(tmp_path / "a"), atlas)


def test_batches_do_not_change_the_figures(lines, tmp_path):
    one = watch_corpus(model(), Letters(), lines, tmp_path / "a", batch_size=1, statistics="full")
    all_at_once = watch_corpus(model(), Letters(), lines, tmp_path / "b", batch_size=11, statistics="full")
    for name, array in one.data_vars.items():
        np.testing.assert_allclose(all_at_once[name].values, array.values, rtol=1e-5, atol=1e-5, err_msg=str(name))


@pytest.mark.slow
def test_two_processes_and_a_killed_run_give_the_same_atlas(lines, tmp_path):
    alone = watch_corpus(model(), Letters(), lines, tmp_path / "alone", batch_size=4)
    assert run(tmp_path, lines, tmp_path / "two", processes=2) == 0
    assert same(Atlas.load(tmp_path / "two"), alone)

    out = tmp_path / "killed"
    assert run(tmp_path, lines, out, die_at=2) == 9
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed.parts").glob("*.zip")}
    assert sorted(parts) == [f"batch-{n:08d}.zip" for n in range(2)]
    assert not out.exists()
    with pytest.raises(CorpusError, match="interrupted run"):
        watch_corpus(model(), Letters(), lines, out, batch_size=4)
    with pytest.raises(CorpusError, match="batch_size"):
        watch_corpus(model(), Letters(), lines, out, batch_size=5, resume=True)
    made = []
    real = corpus._watch_batch
    try:
        corpus._watch_batch = lambda *a: made.append(a) or real(*a)
        resumed = watch_corpus(model(), Letters(), lines, out, batch_size=4, resume=True)
    finally:
        corpus._watch_batch = real
    assert len(made) == 1  # the other two were there already
    assert same(resumed, alone)


def test_cutting_is_said(lines, tmp_path):
    atlas = watch_corpus(model(), Letters(), lines, tmp_path / "a", max_length=10)
    assert int(atlas["n_tokens"].max()) == 10
    assert atlas.provenance[0]["texts_cut"] == sum(len(t) + 1 > 10 for t in texts())


def test_parquet_equals_lines(lines, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"text": texts(), "id": [f"doc {n}" for n in range(11)]})
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet")
    assert list(read_corpus(tmp_path / "corpus.parquet")) == list(read_corpus(lines))


def test_token_ids_are_kept_when_asked(lines, tmp_path):
    atlas = watch_corpus(model(), Letters(), lines, tmp_path / "a", statistics=Watch("light"))
    first = texts()[0]
    assert atlas["token_ids"].values[0, : len(first) + 1].tolist() == [1, *first.encode()]
    assert "".join(atlas["tokens"].values[0].tolist()) == first


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{not json}\n", "c.jsonl", "line 1 of c.jsonl is not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', "c.jsonl", "line 2 .* 'text'"),
        ("", "c.jsonl", "holds no text"),
        ("a", "c.txt", "neither JSON lines"),
    ],
)
def test_bad_corpora(tmp_path, content, name, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        watch_corpus(model(), Letters(), tmp_path / name, tmp_path / "a")


def test_missing_file_and_column(tmp_path):
    with pytest.raises(CorpusError, match="no file"):
        list(read_corpus(tmp_path / "none.jsonl"))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(read_corpus(tmp_path / "c.parquet"))


def test_a_text_longer_than_the_model_takes_is_named(lines, tmp_path):
    longest = max(range(11), key=lambda n: len(texts()[n]))
    most = len(texts()[longest])  # one less than its tokens: a first token stands before the bytes
    with pytest.raises(CorpusError, match=rf"'doc {longest}' has {most + 1} tokens .* at most {most}"):
        watch_corpus(model(), Letters(), lines, tmp_path / "out.zarr", most=most)
    assert watch_corpus(model(), Letters(), lines, tmp_path / "whole.zarr", most=most + 1) is not None


def test_a_taken_out_is_refused_before_the_work(lines, tmp_path):
    taken = tmp_path / "mine"
    taken.mkdir()
    (taken / "notes.txt").write_text("keep")
    ran = []
    with pytest.raises(AtlasError, match="not an atlas"):
        watch_corpus(model(), Letters(), lines, taken, progress=lambda *done: ran.append(done))
    assert not ran
    assert (taken / "notes.txt").read_text() == "keep"


def test_an_encoder_decoder_reads_a_corpus_on_both_sides(lines, tmp_path):
    torch.manual_seed(0)
    config = tr.BartConfig(
        vocab_size=256,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
    )
    atlas = watch_corpus(tr.BartForConditionalGeneration(config).eval(), Letters(), lines, tmp_path / "bart.zarr")
    assert sorted(set(atlas["kind"].values)) == ["cross", "self"]
    assert atlas.sizes["layer"] == 3
    assert np.isfinite(atlas["entropy"].values).all()
