"""Text as bytes: the ids of the byte-level testbeds, their tokenizer, and the text that every Python carries."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

#: A byte is its own id; then come the begin, end and padding tokens.
BOS, EOS, PAD = 256, 257, 258
VOCAB = 259
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}

#: Parts of the standard library that are tests, tables or copies of other projects.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "__pycache__", "ensurepip"}


def encode(text: str | bytes) -> list[int]:
    """The ids of a text, without BOS."""
    return list(text.encode() if isinstance(text, str) else text)


def decode(ids: Any) -> str:
    """The text of ids; BOS, EOS and PAD leave nothing, broken UTF-8 shows as U+FFFD."""
    return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


def byte_tokenizer(max_length: int) -> Any:
    """A transformers tokenizer with ids = bytes, which puts BOS first.

    Text that spells a special token is split into its bytes like any other, so that every text comes back whole.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = _byte_names()
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL.values()))
    bos = SPECIAL["bos_token"]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **SPECIAL,
        model_max_length=max_length,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _byte_names() -> list[str]:
    """The printable stand-in that byte-level tokenizers (GPT-2's and after) use for each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    names = {b: chr(b) for b in shown}
    names |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in names)}
    return [names[b] for b in range(256)]


@dataclass(frozen=True)
class StandardLibrary:
    """The sources and documentation strings of this machine's Python, cut into windows of bytes.

    Files are taken in the order of their names; every ``held_out``-th is kept from the training split.
    """

    split: str = "train"
    held_out: int = 40

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {self.split!r}")

    @cached_property
    def files(self) -> list[Path]:
        """The files of this split, in order."""
        root = Path(sysconfig.get_path("stdlib"))
        found = (p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
        ordered = sorted(found, key=lambda p: p.relative_to(root).as_posix())
        if not ordered:
            raise FileNotFoundError(f"no .py file of the standard library below {root}: this Python ships no sources")
        return [p for n, p in enumerate(ordered) if (n % self.held_out == 0) == (self.split == "test")]

    @cached_property
    def data(self) -> np.ndarray:
        """All bytes of the split, one file after another."""
        return np.frombuffer(b"".join(p.read_bytes() for p in self.files), dtype=np.uint8)

    def describe(self) -> dict[str, Any]:
        """What the text is; another Python version holds another one, with another checksum."""
        sha = hashlib.sha256(self.data.tobytes()).hexdigest()
        return {"python": platform.python_version(), "files": len(self.files), "bytes": len(self.data), "sha256": sha}

    def cut(self, n: int, length: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """n random windows of `length` ids, each BOS and then length - 1 bytes."""
        starts = torch.randint(len(self.data) - length + 2, (n,), generator=generator).tolist()
        rows = np.stack([self.data[s : s + length - 1] for s in starts]).astype(np.int64)
        return torch.cat([torch.full((n, 1), BOS), torch.from_numpy(rows)], dim=1)
