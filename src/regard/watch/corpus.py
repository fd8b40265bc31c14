"""Watching a corpus: batch by batch, over as many processes as there are, with nothing lost when a run breaks off.

Every finished batch is written at once as a small atlas of its own (`OUT.parts/batch-00000007.zip`); a run that is
started again skips those. Which texts share a batch does not depend on the number of processes, and the parts are
merged in the order of their numbers, so any number of processes gives the same atlas to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .atlas import Atlas, check_free, load_atlas, merge
from .provenance import fingerprint, provenance
from .recorder import Recorder
from .settings import Watch

POOL = 64  # batches whose texts are sorted by length together
CHUNK = 32  # parts merged at a time

Record = tuple[int, str, str]
"""Number in the corpus, name, text."""
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all) by the first process."""


class CorpusError(ValueError):
    """A corpus or an interrupted run that cannot be used; the message says what to do."""


def read_corpus(path: str | os.PathLike[str], field: str = "text") -> Iterator[Record]:
    """The texts of a JSON-lines file (`.jsonl`, `.json`, `.ndjson`) or a Parquet file (`.parquet`), in order.

    The name of a text is its `id` if it has one, else its number.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"path: no file {path}")
    kind = path.suffix.lower()
    if kind in (".parquet", ".pq"):
        yield from _read_parquet(path, field)
    elif kind in (".jsonl", ".json", ".ndjson"):
        yield from _read_lines(path, field)
    else:
        raise CorpusError(f"path: {path.name} is neither JSON lines (.jsonl) nor Parquet (.parquet)")


def _read_lines(path: Path, field: str) -> Iterator[Record]:
    number = 0
    with open(path, encoding="utf-8") as lines:
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"path: line {place} of {path.name} is not JSON ({error})") from error
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise CorpusError(f"path: line {place} of {path.name} is not an object with a text in {field!r}")
            yield number, str(record.get("id", number)), record[field]
            number += 1


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CorpusError("path: reading Parquet needs pyarrow: pip install 'regard[parquet]'") from error
    file = parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    if field not in columns:
        raise CorpusError(f"path: {path.name} has no column {field!r}; it has {', '.join(columns)}")
    number = 0
    for batch in file.iter_batches(columns=[c for c in (field, "id") if c in columns]):
        for record in batch.to_pylist():
            if not isinstance(record[field], str):
                raise CorpusError(f"path: row {number} of {path.name} has no text in {field!r}")
            name = record.get("id")
            yield number, str(number if name is None else name), record[field]
            number += 1


def batches(records: Iterator[Record], batch_size: int) -> Iterator[list[Record]]:
    """Batches of texts of similar length; the same for every process. Empty texts are left out."""
    while pool := list(islice(records, batch_size * POOL)):
        pool = sorted((r for r in pool if r[2]), key=lambda r: (len(r[2]), r[0]))
        for at in range(0, len(pool), batch_size):
            yield pool[at : at + batch_size]


def watch_corpus(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    statistics: str | Sequence[str] | Watch = "default",
    batch_size: int = 8,
    max_length: int | None = None,
    most: int | None = None,
    field: str = "text",
    resume: bool = False,
    progress: Progress | None = None,
) -> Atlas | None:
    """Watch `model` on every text of a corpus and save the atlas at `out`.

    Under torchrun each process takes its share of the batches and the first one merges and saves; the others return
    None. Token ids are kept only if `statistics` is a `Watch` with `tokens=True` (a corpus is large).

    Args:
        model: on the device it shall run on.
        tokenizer: as in transformers.
        path: JSON lines or Parquet.
        out: where the atlas goes; finished batches wait in `OUT.parts` beside it.
        statistics: as in `regard.watch`.
        batch_size: texts that run together.
        max_length: texts are cut to so many tokens (how many were cut stands in the provenance); None cuts nothing.
        most: the longest text the model takes, in tokens; a longer one is refused by name before it runs.
        field: the field or column of the text.
        resume: go on with a run that broke off; without it, parts of an earlier run are an error.
        progress: called with (batches done, batches in all) after every batch of the first process.

    Raises:
        CorpusError: an unreadable corpus; a text longer than `most`; parts of another run.
        AtlasError: an `out` that is taken by something else.
    """
    if batch_size < 1:
        raise CorpusError(f"batch_size: must be at least 1, got {batch_size}")
    if max_length is not None and max_length < 1:
        raise CorpusError(f"max_length: must be at least 1 or None, got {max_length}")
    settings = statistics if isinstance(statistics, Watch) else Watch(statistics, tokens=False)
    path, out = Path(path), Path(out)
    rank, world, joined = _join(model)
    parts = out.with_name(f"{out.name}.parts")
    facts = {
        "corpus": path.name,
        "digest": _digest(path),
        "field": field,
        "batch_size": batch_size,
        "max_length": max_length,
        "statistics": settings.to_json(),
        "model": fingerprint(model),
    }
    total = sum(1 for _ in batches(read_corpus(path, field), batch_size))
    if total == 0:
        raise CorpusError(f"path: {path.name} holds no text")
    if rank == 0:
        _open(parts, out, facts, resume)
    _wait(world)
    run = provenance(model) | {"corpus": path.name, "batch_size": batch_size, "max_length": max_length}
    for number, records in enumerate(batches(read_corpus(path, field), batch_size)):
        place = parts / f"batch-{number:08d}.zip"
        if number % world == rank and not place.exists():
            _watch_batch(model, tokenizer, records, settings, max_length, most, run).save(place)
        if rank == 0 and progress is not None:
            progress(number + 1, total)
    _wait(world)
    atlas = None
    if rank == 0:
        atlas = _collect(parts, total)
        atlas.save(out)
        shutil.rmtree(parts)
    _wait(world)
    if joined:
        dist.destroy_process_group()
    return atlas


def _watch_batch(
    model: nn.Module,
    tokenizer: Any,
    records: list[Record],
    settings: Watch,
    max_length: int | None,
    most: int | None,
    run: dict[str, Any],
) -> Atlas:
    rows = [list(tokenizer(text)["input_ids"]) for _, _, text in records]
    cut = 0 if max_length is None else sum(len(row) > max_length for row in rows)
    if cut:  # the tokenizer cuts, so that closing special tokens stay
        rows = [list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"]) for _, _, text in records]
    for (_, name, _), row in zip(records, rows, strict=True):
        if most is not None and len(row) > most:
            raise CorpusError(
                f"path: text {name!r} has {len(row)} tokens and the model takes at most {most}: split it, or give "
                f"max_length={most} (`--tokens {most}`) for the first of them"
            )
    kept = [(record, row) for record, row in zip(records, rows, strict=True) if row]
    size = max((len(row) for _, row in kept), default=0)
    if size == 0:
        raise CorpusError(f"path: text {records[0][1]!r} has no tokens")
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = torch.full((len(kept), size), 0 if pad is None else int(pad), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, (_, row) in enumerate(kept):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids.to(device)}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.to(device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # it reads the text on both sides
        inputs["decoder_input_ids"] = inputs["input_ids"]
        if "attention_mask" in inputs:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    with torch.no_grad(), Recorder(model, settings, tokenizer) as recorder:
        recorder.annotate(names=[f"{number}\t{name}" for (number, name, _), _ in kept])
        model(**inputs)
    atlas = recorder.atlas
    atlas.attrs["provenance"] = json.dumps([run])
    atlas.attrs["cut"] = cut
    return atlas


def _collect(parts: Path, total: int) -> Atlas:
    """All parts merged in order, samples in the order of the corpus."""
    whole: Atlas | None = None
    cut = 0
    paths = [parts / f"batch-{number:08d}.zip" for number in range(total)]
    for at in range(0, total, CHUNK):
        loaded = [load_atlas(p) for p in paths[at : at + CHUNK]]
        cut += sum(int(a.attrs.pop("cut", 0)) for a in loaded)
        whole = merge([whole, *loaded] if whole is not None else loaded)
    assert whole is not None
    labels = [str(label).split("\t", 1) for label in whole["sample"].values]
    order = np.argsort([int(number) for number, _ in labels], kind="stable")
    whole = whole.isel(sample=order)
    whole = whole.assign_coords(sample=np.array([labels[i][1] for i in order], dtype=object))
    whole.attrs["provenance"] = json.dumps([{**run, "texts_cut": cut} for run in whole.provenance])
    return whole


def _open(parts: Path, out: Path, facts: dict[str, Any], resume: bool) -> None:
    """Make the folder of parts, or check that it is of this very run; `out` is judged before the work, not after."""
    check_free(out)
    manifest = parts / "run.json"
    if parts.exists() and any(parts.iterdir()):
        if not manifest.is_file():
            raise CorpusError(f"out: {parts} exists and holds no run; remove it or give another out")
        if not resume:
            raise CorpusError(f"out: {parts} holds an interrupted run; go on with resume=True (--resume) or remove it")
        earlier = json.loads(manifest.read_text())
        other = [f"{k} ({earlier.get(k)!r} then, {v!r} now)" for k, v in facts.items() if earlier.get(k) != v]
        if other:
            raise CorpusError(f"resume: the run in {parts} was another one: {'; '.join(other)}")
        return
    parts.mkdir(parents=True, exist_ok=True)
    fresh = manifest.with_suffix(".new")
    fresh.write_text(json.dumps(facts, indent=1))
    os.replace(fresh, manifest)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise CorpusError(f"path: no file {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _join(model: nn.Module) -> tuple[int, int, bool]:
    """This process's rank, the number of processes, and whether the group that torchrun announces was joined here."""
    if not dist.is_available():
        return 0, 1, False
    joined = not dist.is_initialized()
    if joined:
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return 0, 1, False
        device = next(model.parameters()).device.type
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), joined


def _wait(world: int) -> None:
    if world > 1:
        dist.barrier()


__all__ = ["CorpusError", "read_corpus", "watch_corpus"]
