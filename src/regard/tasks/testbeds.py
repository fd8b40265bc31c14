"""Models by name: the shipped testbed, a folder, or the hub; and the command that makes the testbed."""

from __future__ import annotations

import hashlib
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
from torch import Tensor

from regard.train.trainer import Recipe, token_loss

DATA = Path(str(resources.files("regard") / "data"))
PREFIX = "testbed:"
#: Testbeds and their folders inside the package.
_NAMES = (
    "decoder",
    "lists",
    "maps",
    "numbers",
    "roles",
    "lexicon",
    "arith",
    "conflict",
    "conflict-sft",
    "recital",
    "vit",
    "video",
    "vlm",
)
TESTBEDS = {name: DATA / name for name in _NAMES}
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

    from regard.models.saved import is_saved, load_saved

    source, local = _find(str(name))
    if local and is_saved(source):
        own = load_saved(source, dtype=_dtype(dtype))
        return Loaded(own.to(device), None, str(name))
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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None keeps that of the checkpoint."""
    if not isinstance(dtype, str):
        return dtype
    return None if dtype == "auto" else getattr(torch, dtype)


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
    loss: Callable[[Any, Any], Tensor] = token_loss


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


def _stretched(start: str | Path | None, seed: int, steps: int | None) -> Run:
    """The second training of the decoder: from the weights of the first, at lengths up to all its positions."""
    from regard.tasks import decoder, stretch
    from regard.tasks.bytetext import byte_tokenizer
    from regard.tasks.gates import gates

    if start is None:
        raise ValueError("size 'long' goes on from trained weights: start must name what size 'full' wrote")
    folder, _ = _find(str(start))
    loaded = load(start)
    if tuple(loaded.model.config.architectures or ()) != ("LlamaForCausalLM",) or loaded.model.config.vocab_size != 259:
        raise ValueError(f"start must be a decoder testbed, {str(start)!r} is a {type(loaded.model).__name__}")
    how = stretch.STRETCH
    if steps is not None:
        how = replace(how, recipe=stretch.shortened(how.recipe, steps))
    mixture = stretch.StretchMixture(how, seed)
    made = Path(folder, "training.json")
    return Run(
        model=loaded.model,
        batches=mixture,
        recipe=how.recipe,
        evaluate=decoder.Evaluation(length=2048, n=8),
        gates=lambda model: gates(model, long=True),
        tokenizer=byte_tokenizer(loaded.model.config.max_position_embeddings),
        told={
            "size": asdict(how),
            "text": mixture.text.describe(),
            "start": {
                "sha256": hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest(),
                "training": json.loads(made.read_text()) if made.exists() else None,
            },
        },
        loss=stretch.placed_loss,
    )


def _symbolic(name: str, size: str, seed: int, steps: int | None, start: str | Path | None = None) -> Run:
    from regard.tasks.symbolic import SYMBOLIC

    bed = SYMBOLIC[name]
    model: Any = None
    told: dict[str, Any] = {}
    if bed.start is not None:
        model, told["start"] = _started(PREFIX + bed.start if start is None else start)
        plain: Any = bed.build(seed)
        given, made = model.config.to_dict(), plain.config.to_dict()
        if any(given.get(k) != made[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")):
            raise ValueError(f"start must be a {bed.start} testbed, {str(start)!r} is of another shape")
    recipe = bed.recipe if size == "full" else replace(bed.recipe, steps=20, warmup=4, decay=8)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    shape = {"rows": bed.rows, "layers": bed.layers, "dim": bed.dim, "heads": bed.heads, "positions": bed.positions}
    if bed.lessons:
        told["lessons"] = [[until, [repr(t) for t in tasks]] for until, tasks in bed.lessons]
    return Run(
        model=bed.build(seed) if model is None else model,
        batches=bed.batches(seed),
        recipe=recipe,
        evaluate=lambda model: bed.measure(model, 64),
        gates=lambda model: bed.gates(model, 2000 if size == "full" else 64),
        tokenizer=bed.vocabulary.tokenizer(bed.positions),
        told={"size": {**shape, "recipe": asdict(recipe)}, "tasks": [repr(task) for task in bed.tasks], **told},
    )


def _recital(size: str, seed: int, steps: int | None) -> Run:
    from regard.tasks import recital
    from regard.tasks.bytetext import byte_tokenizer

    shape = recital.SIZES[size]
    if steps is not None:
        recipe = recital.shortened(shape.shape.recipe, steps)
        shape = replace(shape, shape=replace(shape.shape, recipe=recipe))
    mixture = recital.RecitalMixture(shape, seed)
    rows = 256 if size == "full" else 16
    return Run(
        model=recital.build(shape, seed),
        batches=mixture,
        recipe=shape.shape.recipe,
        evaluate=lambda model: recital.gates(model, shape, min(rows, 64))["values"],
        gates=lambda model: recital.gates(model, shape, rows),
        tokenizer=byte_tokenizer(shape.shape.positions),
        told={"size": asdict(shape), "text": mixture.text.describe()},
    )


def _vit(size: str, seed: int, steps: int | None) -> Run:
    from regard.tasks import vision, vit

    shape = vit.SIZES[size]
    if steps is not None:
        shape = replace(shape, recipe=vit.shortened(shape.recipe, steps))
    test = vision.digits("test")
    held_out = test if size == "full" else vision.Images(test.x[:64], test.labels[:64])
    return Run(
        model=vit.build(shape, seed),
        batches=vit.batches(shape, seed),
        recipe=shape.recipe,
        evaluate=lambda model: {"accuracy": float(vit.right(model, held_out).double().mean())},
        gates=lambda model: vit.gates(model, held_out),
        tokenizer=None,
        told={"size": asdict(shape), "images": "scikit-learn's digits; every fifth one is held out"},
        loss=vit.picture_loss,
    )


def _vlm(size: str, seed: int, steps: int | None, start: str | Path | None = None) -> Run:
    from regard.tasks import vlm
    from regard.tasks.scene_text import VOCABULARY

    shape = vlm.SIZES[size]
    if steps is not None:
        shape = replace(shape, recipe=vlm.shortened(shape.recipe, steps))
    model: Any = vlm.build(shape, seed)
    told: dict[str, Any] = {"size": asdict(shape)}
    if size == "long":
        built, (model, told["start"]) = type(model), _started(start)
        if not isinstance(model, built):
            raise ValueError(f"start must be a vlm testbed, {str(start)!r} is a {type(model).__name__}")
    return Run(
        model=model,
        batches=vlm.Mixture(shape, seed),
        recipe=shape.recipe,
        evaluate=lambda model: vlm.gates(model, 64)["values"],
        gates=lambda model: vlm.gates(model, 16 if size == "smoke" else 400),
        tokenizer=VOCABULARY.tokenizer(shape.shape.positions),
        told=told,
        loss=vlm.lesson_loss,
    )


def _started(start: str | Path | None) -> tuple[Any, dict[str, Any]]:
    """The model that a second training goes on from, and what training.json tells of it."""
    if start is None:
        raise ValueError("size 'long' goes on from trained weights: start must name what size 'full' wrote")
    folder, _ = _find(str(start))
    made = Path(folder, "training.json")
    return load(start).model, {
        "sha256": hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest(),
        "training": json.loads(made.read_text()) if made.exists() else None,
    }


def _video(size: str, seed: int, steps: int | None, start: str | Path | None = None) -> Run:
    from regard.models.dit import VideoDiT
    from regard.tasks import video

    def measure(model: Any) -> dict[str, Any]:
        from regard.tasks.video_gates import gates

        return gates(model, quick=size == "smoke")

    shape = video.SIZES[size]
    if steps is not None:
        shape = replace(shape, recipe=replace(shape.recipe, steps=steps))
    model: Any = video.build(shape, seed)
    told: dict[str, Any] = {"size": asdict(shape)}
    if size == "long":
        model, told["start"] = _started(start)
        if not isinstance(model, VideoDiT):
            raise ValueError(f"start must be a video testbed, {str(start)!r} is a {type(model).__name__}")
    return Run(
        model=model,
        batches=video.VideoMixture(shape, seed),
        recipe=shape.recipe,
        evaluate=video.evaluation(shape),
        gates=measure,
        tokenizer=None,
        told=told,
        loss=video.video_loss,
    )


#: Testbeds that are no `Symbolic`.
_MADE: dict[str, Callable[[str, int, int | None], Run]] = {
    "decoder": _decoder,
    "recital": _recital,
    "vit": _vit,
    "video": _video,
    "vlm": _vlm,
}
#: Those with a second training, size "long".
_SECOND: dict[str, Callable[[str | Path | None, int, int | None], Run]] = {
    "decoder": _stretched,
    "video": lambda start, seed, steps: _video("long", seed, steps, start),
    "vlm": lambda start, seed, steps: _vlm("long", seed, steps, start),
}


def train(
    name: str,
    out: str | Path,
    *,
    size: str = "full",
    seed: int = 0,
    steps: int | None = None,
    start: str | Path | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """Trains a testbed and writes it to a folder that ``load`` and transformers read.

    Interrupted (Ctrl-C or SIGTERM), it writes a checkpoint below ``out`` and the same call goes on from there.

    Args:
        name: one of `TESTBEDS`.
        out: folder for config, weights, tokenizer and ``training.json`` (recipe, curve, gates, versions, machine;
            ``starts``: the steps at which the work was taken up).
        size: "full", the shipped one, or "smoke", which is done in seconds and passes no gate; of the decoder also
            "long", which goes on from the weights of "full" at up to 8,192 tokens.
        seed: of the weights and of every batch.
        steps: fewer (or more) steps than the recipe's; the run is the same up to its final decay.
        start: what `load` takes: the weights that size "long" goes on from, or "conflict-sft" (by default the shipped
            "conflict").
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
    sizes = ("full", "smoke", "long") if name in _SECOND else ("full", "smoke")
    if size not in sizes:
        raise ValueError(f"size of {name!r} must be one of {', '.join(sizes)}, got {size!r}")
    if start is not None and size != "long" and not _goes_on(name):
        raise ValueError(f"start goes with size 'long'; {name!r} of size {size!r} begins from nothing")
    if size == "long":
        ready = _SECOND[name](start, seed, steps)
    else:
        ready = _MADE[name](size, seed, steps) if name in _MADE else _symbolic(name, size, seed, steps, start)
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
            loss=ready.loss,
            evaluate=ready.evaluate,
            evaluate_every=100,
            on_step=show,
            run_name=f"{name}, size {size}, seed {seed}",
        )
        trainer.run()
    measured = ready.gates(ready.model)
    ready.model.save_pretrained(out, safe_serialization=True)
    if ready.tokenizer is not None:
        ready.tokenizer.save_pretrained(out)
    record = {
        "testbed": name,
        "command": f"regard train {name} --out {out.name} --size {size} --seed {seed}"
        + (f" --start {Path(start).name}" if start is not None else "")
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


def _goes_on(name: str) -> bool:
    """Whether a testbed begins with another one's weights."""
    from regard.tasks.symbolic import SYMBOLIC

    return name in SYMBOLIC and SYMBOLIC[name].start is not None


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
