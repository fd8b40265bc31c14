"""Models by name: the shipped testbed, a folder, or the hub; and the command that makes the testbed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from regard.train.trainer import Recipe

DATA = Path(str(resources.files("regard") / "data"))
PREFIX = "testbed:"
#: Testbeds and their folders inside the package.
TESTBEDS = {name: DATA / name for name in ("decoder", "lists", "maps", "numbers", "roles", "lexicon", "arith")}
#: Folder of the shipped decoder.
DECODER = TESTBEDS["decoder"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer (None for a model without text) and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def load(name: str | Path, *, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu") -> Loaded:
    """Loads a model with SDPA attention, ready to be watched.

    Args:
        name: "testbed:decoder" (shipped, needs no network), a folder with config.json and safetensors (what
            ``save_pretrained`` or sentence-transformers writes), or else a name on the Hugging Face hub, which is the
            only case that may use the network (not with HF_HUB_OFFLINE=1).
        dtype: of the weights; None keeps that of the checkpoint.
        device: where the model goes.

    Returns:
        A ``Loaded``. The class is the one named in the config's ``architectures``, or AutoModel without one.

    Raises:
        ValueError: an unknown testbed; a model that cannot attend through SDPA or needs code from its repository.
        FileNotFoundError: no such folder, no config.json or weights in it, or a hub name that is not at hand.
    """
    from transformers import AutoConfig

    source, local = _find(str(name))
    how = {"local_files_only": local or _offline()}
    config = _reached(name, lambda: AutoConfig.from_pretrained(source, **how))
    cls = _model_class(config, str(name))
    try:
        model = _reached(
            name,
            lambda: cls.from_pretrained(
                source, attn_implementation="sdpa", use_safetensors=True, dtype=dtype or "auto", **how
            ),
        )
    except ValueError as error:
        if "scaled_dot_product_attention" in str(error) or "sdpa" in str(error):
            raise ValueError(
                f"{name!r} ({cls.__name__}) has no SDPA attention in this transformers, so nothing of it reaches the "
                "seam; load another architecture or a later transformers"
            ) from error
        raise
    tokenizer = _tokenizer(source, config, str(name), how)
    return Loaded(model.to(device).eval(), tokenizer, str(name))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _find(name: str) -> tuple[str, bool]:
    """Where a name leads, and whether that is on this machine."""
    if name.startswith(PREFIX):
        testbed = name.removeprefix(PREFIX)
        if testbed not in TESTBEDS:
            known = ", ".join(PREFIX + t for t in TESTBEDS)
            raise ValueError(f"there is no testbed {name!r}; there is {known}")
        if not (TESTBEDS[testbed] / "model.safetensors").exists():
            raise FileNotFoundError(
                f"this installation ships no weights of {name!r}; `regard train {testbed} --out FOLDER` makes them"
            )
        return str(TESTBEDS[testbed]), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        nested = folder / "0_Transformer"  # older sentence-transformers
        if not (folder / "config.json").exists() and nested.is_dir():
            folder = nested
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"the folder {name!r} has no config.json; name what save_pretrained wrote")
        return str(folder), True
    if name in TESTBEDS:
        raise FileNotFoundError(f"{name!r} is no folder; the shipped testbed is called {PREFIX + name!r}")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name!r}")
    return name, False


def _reached(name: str | Path, get: Any) -> Any:
    """Runs a loading step; what is not at hand becomes an error that says what can be done."""
    try:
        return get()
    except OSError as error:
        way = (
            "HF_HUB_OFFLINE is set, so only models already in the cache load"
            if _offline()
            else "check the name and the network"
        )
        raise FileNotFoundError(
            f"cannot load {str(name)!r}: not a testbed ({', '.join(PREFIX + t for t in TESTBEDS)}), not a complete "
            f"folder with config.json and safetensors weights, and not at hand from the hub ({way}). "
            f"transformers said: {str(error).strip().splitlines()[0]}"
        ) from error


def _model_class(config: Any, name: str) -> Any:
    import transformers

    named = getattr(config, "architectures", None)
    if not named:
        return transformers.AutoModel
    cls = getattr(transformers, named[0], None)
    if cls is None:
        raise ValueError(
            f"{name!r} is a {named[0]}, which transformers {transformers.__version__} does not have; regard runs no "
            "code from model repositories: load the model yourself and pass it to regard.watch"
        )
    return cls


def _tokenizer(source: str, config: Any, name: str, how: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / f).exists() for f in _TOKENIZER_FILES):
        return None
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        return None  # pictures or sound
    try:
        return _reached(name, lambda: AutoTokenizer.from_pretrained(source, **how))
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"the tokenizer of {name!r} does not load: {error}") from error


@dataclass(frozen=True)
class Run:
    """What training a testbed takes: made by the testbed's own module, stepped and written by `train`."""

    model: Any
    batches: Callable[[int], Any]
    recipe: Recipe
    evaluate: Callable[[Any], dict[str, float]] | None
    gates: Callable[[Any], dict[str, Any]]
    tokenizer: Any
    told: dict[str, Any]
    """What training.json holds of it: `size`, and anything else."""


def _decoder(size: str, seed: int, steps: int | None) -> Run:
    from regard.tasks import decoder
    from regard.tasks.bytetext import byte_tokenizer
    from regard.tasks.gates import gates

    shape = decoder.SIZES[size]
    if steps is not None:
        shape = replace(shape, recipe=replace(shape.recipe, steps=steps))
    mixture = decoder.Mixture(shape, seed)
    full = size == "full"
    return Run(
        model=decoder.build(shape, seed),
        batches=mixture,
        recipe=shape.recipe,
        evaluate=decoder.Evaluation(length=min(256, max(shape.phases[-1].lengths)), n=32 if full else 4),
        gates=lambda model: gates(model, n=128 if full else 4, rows=16 if full else 2),
        tokenizer=byte_tokenizer(shape.positions),
        told={"size": asdict(shape), "text": mixture.text.describe()},
    )


def _symbolic(name: str, size: str, seed: int, steps: int | None) -> Run:
    from regard.tasks.symbolic import SYMBOLIC

    bed = SYMBOLIC[name]
    recipe = bed.recipe if size == "full" else replace(bed.recipe, steps=20, warmup=4, decay=8)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    shape = {"rows": bed.rows, "layers": bed.layers, "dim": bed.dim, "heads": bed.heads, "positions": bed.positions}
    return Run(
        model=bed.build(seed),
        batches=bed.batches(seed),
        recipe=recipe,
        evaluate=lambda model: bed.measure(model, 64),
        gates=lambda model: bed.gates(model, 2000 if size == "full" else 64),
        tokenizer=bed.vocabulary.tokenizer(bed.positions),
        told={"size": {**shape, "recipe": asdict(recipe)}, "tasks": [repr(task) for task in bed.tasks]},
    )


def train(
    name: str,
    out: str | Path,
    *,
    size: str = "full",
    seed: int = 0,
    steps: int | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """Trains a testbed and writes it to a folder that ``load`` and transformers read.

    Interrupted (Ctrl-C or SIGTERM), it writes a checkpoint below ``out`` and the same call goes on from there.

    Args:
        name: one of `TESTBEDS`.
        out: folder for config, weights, tokenizer and ``training.json`` (recipe, curve, gates, versions, machine;
            ``starts``: the steps at which the work was taken up).
        size: "full", the shipped one, or "smoke", which is done in seconds and passes no gate.
        seed: of the weights and of every batch.
        steps: fewer (or more) steps than the recipe's; the run is the same up to its final decay.
        console: a rich console for the progress bar; None makes one on stderr.

    Returns:
        What training.json holds.

    Raises:
        ValueError: unknown name or size, or checkpoints of another run in ``out``.
        regard.train.trainer.Interrupted: stopped by a signal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from regard.train.trainer import Trainer

    if name not in TESTBEDS:
        raise ValueError(f"there is no testbed {name!r} to train; there is {', '.join(TESTBEDS)}")
    if size not in ("full", "smoke"):
        raise ValueError(f"size must be 'full' or 'smoke', got {size!r}")
    ready = _decoder(size, seed, steps) if name == "decoder" else _symbolic(name, size, seed, steps)
    out = Path(out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bar = progress.add_task(f"training {name}", total=ready.recipe.steps)

        def show(step: int, entry: dict[str, float]) -> None:
            progress.update(bar, completed=step, description=f"training {name}, loss {entry['loss']:.3f}")

        trainer = Trainer(
            ready.model,
            ready.batches,
            ready.recipe,
            out / "checkpoints",
            evaluate=ready.evaluate,
            evaluate_every=100,
            on_step=show,
            run_name=f"{name}, size {size}, seed {seed}",
        )
        trainer.run()
    measured = ready.gates(ready.model)
    ready.model.save_pretrained(out, safe_serialization=True)
    ready.tokenizer.save_pretrained(out)
    record = {
        "testbed": name,
        "command": f"regard train {name} --out {out.name} --size {size} --seed {seed}"
        + (f" --steps {steps}" if steps is not None else ""),
        **ready.told,
        "seed": seed,
        "parameters": sum(p.numel() for p in ready.model.parameters()),
        "gates": measured,
        "curve": curve(trainer.history),
        "seconds": round(trainer.seconds, 1),
        "starts": trainer.starts,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
    }
    written = json.dumps(record, indent=1) + "\n"
    (out / "training.json").write_text(written)
    shutil.rmtree(out / "checkpoints")
    return json.loads(written)


def curve(history: list[dict[str, float]], every: int = 50) -> list[dict[str, float]]:
    """The history in few points: the mean loss of every stretch of steps, and each evaluation where it was made."""
    points: list[dict[str, float]] = []
    for start in range(0, len(history), every):
        part = history[start : start + every]
        figures = {k: round(v, 4) for entry in part for k, v in entry.items() if k not in ("grad_norm", "rate")}
        points.append(figures | {"loss": round(sum(e["loss"] for e in part) / len(part), 4)})
    return points


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "threads": torch.get_num_threads(), "system": platform.system()}


def _versions() -> dict[str, str]:
    import safetensors
    import transformers

    import regard

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "regard": regard.__version__,
    }
