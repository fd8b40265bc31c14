"""The command: regard watch | report | roles | measures | study | papers | train.

What a command found goes to stdout (`--json`: nothing but JSON); progress and messages go to stderr. Exit codes:
0 done, 1 the work failed, 2 the command was not understood. torch is imported only by the commands that need it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import regard

app = typer.Typer(
    name="regard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Attention patterns in transformers: watch every head at any length, name it, prove what papers claim.",
)
say = Console(stderr=True)

DEMO_MODEL = "testbed:decoder"
DEMO_TEXT = Path(__file__).parent / "data" / "demo.txt"
MY_FINDINGS = Path("out/findings")


class Statistics(StrEnum):
    """How much to watch."""

    light = "light"
    default = "default"
    full = "full"


class Size(StrEnum):
    """How much to run."""

    smoke = "smoke"
    full = "full"


class TrainSize(StrEnum):
    """How much to train."""

    smoke = "smoke"
    full = "full"
    long = "long"


class Status(StrEnum):
    """Status of a paper."""

    open = "open"
    holds = "holds"
    refuted = "does not hold"
    unmeasured = "not measured"


MODEL_HELP = "A folder, a hub name, or testbed:decoder."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
ModelOrDemo = Annotated[str | None, typer.Argument(help=MODEL_HELP + " Not needed with --demo.", show_default=False)]
Text = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file.", exists=True, dir_okay=False)]
Image = Annotated[
    Path | None, typer.Option("--image", help="A picture, for a vision model.", exists=True, dir_okay=False)
]
AtlasPath = Annotated[Path | None, typer.Option("--atlas", help="An atlas that regard watch wrote.")]
Findings = Annotated[Path, typer.Option("--out", "-o", help="Folder of your own findings.")]
Tokens = Annotated[int | None, typer.Option(min=2, help="Watch only the first so many tokens of the text.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Masking = Annotated[str, typer.Option(help="How a head is taken out: zero, uniform, mean or resample.")]
TaskLength = Annotated[int, typer.Option(min=8, help="Bytes of a needle's text; tokens of a repetition.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Page = Annotated[Path | None, typer.Option("--page", help="Write a page with the heat map there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Nothing but JSON on stdout.")]
Probe = Annotated[
    bool, typer.Option("--probe", help="Judge retrieval and induction on needles and repeated segments as well.")
]
Demo = Annotated[bool, typer.Option("--demo", help="The shipped decoder on the shipped text, with --probe.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code; an error is one message unless --debug asks for the traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or bool(os.environ.get("REGARD_DEBUG"))
    try:
        app(args=[a for a in arguments if a != "--debug"])  # so that it may stand anywhere
    except Exception as error:
        if debug:
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        say.print(f"[red]error:[/red] {escape(text or type(error).__name__)}", highlight=False, soft_wrap=True)
        say.print(f"({type(error).__name__}; the same command with --debug shows where)", style="dim", highlight=False)
        sys.exit(1)
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        print(regard.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of every command; `main` reads --debug, wherever it stands."""


@app.command()
def watch(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The atlas: a Zarr folder.")],
    text: Text = None,
    image: Image = None,
    corpus: Annotated[
        Path | None, typer.Option(help='JSON lines with a field "text", or Parquet.', exists=True, dir_okay=False)
    ] = None,
    statistics: Annotated[Statistics, typer.Option(help="How much to watch.")] = Statistics.default,
    tokens: Tokens = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a corpus that run together.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted corpus run.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Watch a model on a text, a picture or a corpus and write the atlas.

    A corpus is split over processes by `torchrun --nproc-per-node N -m regard watch ...`.
    """
    if sum(source is not None for source in (text, image, corpus)) != 1:
        raise typer.BadParameter("give one of them", param_hint="--text / --image / --corpus")
    if corpus is None and resume:
        raise typer.BadParameter("only a corpus run can be resumed", param_hint="--resume")
    if image is not None and tokens is not None:
        raise typer.BadParameter("a picture has no tokens to cut", param_hint="--tokens")
    loaded = _load(model, device)
    if corpus is not None:
        atlas = _watch_corpus(loaded, corpus, out, statistics.value, batch, tokens, resume)
        if atlas is None:  # another rank than the first: it has handed its part over
            return
    else:
        atlas = _watch_one(loaded, text, image, statistics.value, tokens)
        atlas.save(out)
    facts = {"atlas": str(out), "layers": atlas.sizes["layer"], "heads": atlas.sizes["head"]}
    facts |= {"samples": atlas.sizes.get("sample"), "variables": sorted(map(str, atlas.data_vars))}
    if as_json:
        _print_json(facts)
    else:
        Console().print(repr(atlas), markup=False, highlight=False)
        print(out)


@app.command()
def report(
    model: ModelOrDemo = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    text: Text = None,
    image: Image = None,
    atlas: AtlasPath = None,
    tokens: Tokens = None,
    demo: Demo = False,
    probe: Probe = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write the report: one page with every head's map, role and evidence."""
    given = [name for name, value in (("--text", text), ("--image", image), ("--atlas", atlas)) if value is not None]
    if demo and (model or given):
        raise typer.BadParameter(
            f"brings its own model and text; leave out {', '.join(given) or 'MODEL'}", param_hint="--demo"
        )
    if not demo and len(given) != 1:
        raise typer.BadParameter(
            f"give exactly one, got {len(given)}", param_hint="--text / --image / --atlas / --demo"
        )
    if image is not None and tokens is not None:
        raise typer.BadParameter("a picture has no tokens to cut", param_hint="--tokens")
    if atlas is not None:
        _refuse_beside_atlas(model, tokens, probe)
        from regard.watch.atlas import load_atlas

        made = regard.report(load_atlas(atlas), out)
    else:
        if not demo and model is None:
            raise typer.BadParameter("name one: a folder, a hub name or testbed:decoder", param_hint="MODEL")
        loaded = _load(DEMO_MODEL if demo else str(model), device)
        source = DEMO_TEXT if demo else text
        made = _build_report(loaded, out, source, image, tokens, probe or demo)
    if as_json:
        _print_json({"report": str(out), "bytes": made.size, **_roles_json(made.roles)})
        return
    _print_grid(made.roles)
    print(out)


@app.command()
def roles(
    model: ModelOrDemo = None,
    text: Text = None,
    image: Image = None,
    atlas: AtlasPath = None,
    tokens: Tokens = None,
    demo: Demo = False,
    probe: Probe = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Name every head, with the evidence."""
    if demo + sum(source is not None for source in (text, image, atlas)) != 1:
        raise typer.BadParameter("give exactly one", param_hint="--text / --image / --atlas / --demo")
    if image is not None and tokens is not None:
        raise typer.BadParameter("a picture has no tokens to cut", param_hint="--tokens")
    if demo and model:
        raise typer.BadParameter("brings its own model and text; leave out MODEL", param_hint="--demo")
    loaded = None
    if atlas is not None:
        _refuse_beside_atlas(model, tokens, probe)
        from regard.watch.atlas import load_atlas

        watched = load_atlas(atlas)
    else:
        if not demo and model is None:
            raise typer.BadParameter("name one: a folder, a hub name or testbed:decoder", param_hint="MODEL")
        loaded = _load(DEMO_MODEL if demo else str(model), device)
        watched = _watch_one(loaded, text or (None if image else DEMO_TEXT), image, "full", tokens)
    from regard.report.build import judge

    table = judge(watched, _probes(loaded) if loaded and (probe or demo) else {})
    if as_json:
        _print_json(_roles_json(table))
    else:
        _print_roles(table)


@app.command()
def plan(
    model: ModelOrDemo = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan.")] = Path("plan.json"),
    text: Text = None,
    loss: Annotated[
        float | None, typer.Option(min=0.0, help="The most a token's loss may grow, nat; 0.01: 1 % of perplexity.")
    ] = None,
    speed: Annotated[float | None, typer.Option(min=1.0, help="How many times faster attention shall be.")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Length of the sequences it is made on.")] = 2048,
    sequences: Annotated[int, typer.Option(min=1, help="How many it is made on, and measured on.")] = 4,
    needles: Annotated[
        bool, typer.Option("--needles", help="Needles besides: the answers must stay right as well.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--page", help="Write the plan's page there.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The text every Python carries, 4096 tokens, with --needles.")
    ] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find what each head can leave out under a budget, write the plan, and measure it on other parts of the text."""
    if demo + (text is not None) != 1:
        raise typer.BadParameter("give exactly one", param_hint="--text / --demo")
    if loss is not None and speed is not None:
        raise typer.BadParameter("give one budget", param_hint="--loss / --speed")
    if not demo and model is None:
        raise typer.BadParameter("name one: a folder, a hub name or testbed:decoder", param_hint="MODEL")
    from regard.report.plan_page import plan_report
    from regard.tasks import planning

    loaded = _load(model or DEMO_MODEL, device)
    tokens, needles = (4096, True) if demo else (tokens, needles)
    material = planning.Material()
    try:
        source = planning.library_text() if demo else _read(text or Path())
        material.add("text", *planning.windows(loaded, source, tokens, sequences, sequences))
        if needles:
            material.add("needles", *planning.needles(loaded, tokens, sequences, 2 * sequences, seed))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL / --text / --tokens") from error
    kinds = material.calibration_kinds
    with _telling("planning") as say_line:
        made = regard.plan(loaded.model, material.calibration, loss=loss, speed=speed, groups=kinds, progress=say_line)
    made.model["name"] = loaded.name
    made.save(out)  # what follows may be interrupted
    with _working(f"measuring on {len(material.held_out)} other sequences"):
        from regard.plan.measure import measure

        measure(loaded.model, made, material.held_out, groups=material.held_out_kinds)
    made.save(out)
    if page is not None:
        plan_report(made, page, title=loaded.name)
    if as_json:
        shown = {"plan": str(out), "options": made.counts, "predicted": made.predicted}
        _print_json(shown | {"calibration": made.calibration, "measured": made.measured})
        return
    print(made)
    from regard.report.plan_page import outcome

    for caption, rows in outcome(made):
        table = Table(caption, "dense", "planned", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row)
        _print_table(table)
    for path in (out, page):
        if path is not None:
            print(path)


@app.command()
def scan(
    model: Model,
    task: Annotated[str, typer.Option(help="needle or repeated.")] = "needle",
    kind: Masking = "zero",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts of the task.")] = 16,
    length: TaskLength = 256,
    top: Annotated[int, typer.Option(min=1, help="How many heads are printed.")] = 12,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every head's figures there, as JSON.")] = None,
    page: Page = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Take every head out in turn and say what the task's answers then cost."""
    loaded = _load(model, device)
    found = _scan(loaded, task, kind, prompts, length, seed)
    record = _scan_json(found)
    if page is not None:
        from regard.report.scan_page import scan_report

        scan_report([record], page, model=loaded.name)
    if out is not None:
        out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        _print_json(record)
        return
    table = Table("layer", "head", "loss increase, nat", "95%", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for head in record["heads"][:top]:
        low, high = head["interval"]
        table.add_row(str(head["layer"]), str(head["head"]), _number(head["increase"]), f"{low:.3g} .. {high:.3g}")
    _print_table(table)
    print(f"{task}, {prompts} prompts, heads taken out by {kind!r}; the whole model's loss is {record['loss']:.3g} nat")
    for path in (out, page):
        if path is not None:
            print(path)


@app.command()
def circuits(
    model: Model,
    first: Annotated[str, typer.Argument(help="A task: needle or repeated.")] = "needle",
    second: Annotated[str, typer.Argument(help="Another.")] = "repeated",
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of all heads that make up a circuit.")] = 0.2,
    kind: Masking = "zero",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts of each task.")] = 16,
    length: TaskLength = 256,
    page: Page = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """How many of the heads that one task needs another needs too."""
    from regard.tasks.heads import overlap

    loaded = _load(model, device)
    a, b = (_scan(loaded, task, kind, prompts, length, seed) for task in (first, second))
    record = {"tasks": [first, second], "kind": kind, "share": share, **overlap(a, b, share=share, seed=seed)}
    if page is not None:
        from regard.report.scan_page import scan_report

        scan_report([_scan_json(a), _scan_json(b)], page, model=loaded.name, overlap=record)
    if as_json:
        _print_json(record)
        return
    shared = ", ".join(f"{layer}.{head}" for layer, head in record["shared"]) or "none"
    print(f"{first} and {second} share {record['overlap']:.0%} of their heads: {shared}")
    print(f"random circuits of this size share {record['chance']:.0%}, 1 % of them {record['chance_99']:.0%} or more")
    if page is not None:
        print(page)


@app.command()
def measures(as_json: AsJson = False) -> None:
    """List the measures: name, formula, range, paper."""
    from regard import measures as registry

    rows = [registry.get(name) for name in registry.names()]
    if as_json:
        facts = ("name", "formula", "units", "paper")
        listed = [{f: getattr(m, f) for f in facts} | {"range": [_finite(x) for x in m.range]} for m in rows]
        _print_json({"measures": listed})
        return
    table = Table("measure", "formula", "range", "paper", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for m in rows:
        table.add_row(m.name, escape(m.formula), escape(f"[{m.range[0]:g}, {m.range[1]:g}]"), escape(m.paper))
    _print_table(table)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="The paper's slug, as regard papers lists it.", show_default=False)],
    size: Annotated[Size, typer.Option(help="smoke: seconds on a CPU; full: minutes on a GPU.")] = Size.smoke,
    device: Device = "cpu",
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} Left out: the study's own choice.", show_default=False)
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder where findings are kept.")] = Path("out/findings"),
    as_json: AsJson = False,
) -> None:
    """Run the study of a paper and say, claim by claim, whether it holds."""
    from regard.studies import protocol

    if name not in protocol.names():
        raise typer.BadParameter(
            f"no study of {name!r} yet; there are {', '.join(protocol.names())}", param_hint="NAME"
        )
    if model is not None and protocol.default_model(name) is None:
        raise typer.BadParameter(f"study {name!r} brings its own models and takes no other", param_hint="--model")
    _check_device(device)
    _quiet()
    with _working(f"{name}, {size.value}"):
        record = protocol.run_and_record(name, size=size.value, device=device, seed=seed, model=model)
    path = protocol.keep(record, out)
    if as_json:
        _print_json(record)
        return
    claims = {c.id: c for c in protocol.get(name).CLAIMS}
    table = Table("claim", "state", "figure", "95%", "floor", "baseline", "the paper", box=None, header_style="bold")
    for f in record["findings"]:
        claim = claims[f["claim"]]
        interval = "" if f["interval"] is None else f"{f['interval'][0]:.3g} .. {f['interval'][1]:.3g}"
        row = [
            claim.text,
            f["state"],
            _number(f["figure"]),
            interval,
            _number(f["floor"]),
            _number(f["baseline"]),
            claim.paper,
        ]
        table.add_row(*map(escape, row))
    _print_table(table)
    for f in record["findings"]:
        if f["reason"]:
            Console().print(f"{f['claim']}: {f['reason']}", markup=False, highlight=False, soft_wrap=True)
    print(path)


@app.command()
def papers(
    family: Annotated[str | None, typer.Option(help="Only papers of this family.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only papers with this status.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of your own findings, read besides the shipped ones.")] = Path(
        "out/findings"
    ),
    as_json: AsJson = False,
) -> None:
    """List the catalogue of papers: which have a study, and what was found."""
    from regard.studies import papers as catalogue
    from regard.studies import protocol

    rows = catalogue.papers((protocol.SHIPPED, out))
    families = list(dict.fromkeys(r["family"] for r in rows))
    if family is not None and family not in families:
        raise typer.BadParameter(f"no family {family!r}; there are {', '.join(families)}", param_hint="--family")
    rows = [r for r in rows if family in (None, r["family"]) and status in (None, r["status"])]
    if as_json:
        _print_json({"papers": rows})
        return
    table = Table("family", "paper", "status", "title", "claims", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for r in rows:
        colour = {"holds": "green", "does not hold": "red", "not measured": "yellow"}.get(r["status"], "dim")
        claims = catalogue.summary(r["findings"])
        table.add_row(r["family"], r["slug"], f"[{colour}]{r['status']}[/]", escape(r["title"]), escape(claims))
    _print_table(table)
    counts = ", ".join(f"{sum(r['status'] == s for r in rows)} {s}" for s in catalogue.STATUSES)
    print(f"{len(rows)} papers: {counts}")


@app.command()
def train(
    name: Annotated[
        str,
        typer.Argument(
            help="decoder, lists, maps, numbers, roles, lexicon, arith, conflict, conflict-sft, recital, vit or video.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model.")],
    size: Annotated[
        TrainSize,
        typer.Option(help="smoke: tiny, in seconds; full: the whole; long: a second training, from --start."),
    ] = TrainSize.full,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Other than the recipe's.")] = None,
    start: Annotated[str | None, typer.Option(help="Weights that size long (or conflict-sft) goes on from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a testbed from scratch; interrupted, the same command goes on from its checkpoint."""
    from regard.tasks import testbeds

    if name not in testbeds.TESTBEDS:
        raise typer.BadParameter(f"no testbed {name!r}; there is {', '.join(testbeds.TESTBEDS)}", param_hint="NAME")
    _quiet()
    record = testbeds.train(name, out, size=size.value, seed=seed, steps=steps, start=start, console=say)
    if as_json:
        _print_json(record)
        return
    gates = record["gates"]
    table = Table("gate", "reached", "needed", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for gate, needed in gates["thresholds"].items():
        table.add_row(gate, f"{gates['values'][gate]:.3f}", f"{needed:g}")
    _print_table(table)
    print(out)


# -- the work ---------------------------------------------------------------------------------------------------


def _load(name: str, device: str) -> Any:
    """The model on its device; a name that leads nowhere is a usage error."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # under torchrun, a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    _check_device(device)
    _quiet()
    try:
        with _working(f"loading {name}"):
            return regard.load(name, device=device)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error


def _quiet() -> None:
    """No progress bars of other libraries on our stderr."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device!r} cannot be used here: {error}", param_hint="--device") from error


def _encode(loaded: Any, text: str, tokens: int | None) -> dict[str, Any]:
    """The text as inputs; one that the model cannot take is a usage error."""
    from regard.tasks.text import encode

    try:
        return encode(loaded, text, tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from error


def _watch_one(loaded: Any, text: Path | None, image: Path | None, statistics: str, tokens: int | None) -> Any:
    """The atlas of a text or of a picture, of which exactly one is given; a video model's text is a prompt."""
    import torch

    if _makes_videos(loaded):
        return _watch_video(loaded, text, image, statistics, tokens)
    if image is not None:
        from regard.report.picture import watch_picture

        with _working(f"watching {image}"):
            return watch_picture(loaded.model, image, statistics)
    assert text is not None
    inputs = _encode(loaded, _read(text), tokens)
    with _working(f"watching {inputs['input_ids'].shape[1]} tokens"), torch.no_grad():
        with regard.watch(loaded.model, statistics=statistics, tokenizer=loaded.tokenizer) as watched:
            loaded.model(**inputs)
    return watched.atlas


def _makes_videos(loaded: Any) -> bool:
    from regard.models.dit import VideoDiT

    return isinstance(loaded.model, VideoDiT)


def _watch_video(loaded: Any, text: Path | None, image: Path | None, statistics: str, tokens: int | None) -> Any:
    """The atlas of a video model on a true video of a prompt, noised to several times of the flow."""
    from regard.tasks.video_inputs import inputs_of, watch_video

    if text is None or image is not None:
        raise typer.BadParameter(
            'a video model is watched on its prompt: give --text FILE that holds words such as "3 7 square"',
            param_hint="--image",
        )
    if tokens is not None:
        raise typer.BadParameter("a video has no tokens to cut", param_hint="--tokens")
    try:
        asked = inputs_of(_read(text), 0.0)
    except ValueError as error:
        raise typer.BadParameter(f"of a video model it holds the prompt, and {error}", param_hint="--text") from error
    with _working("watching a video at several times of the flow"):
        return watch_video(loaded.model, asked["x"], asked["words"], statistics)


def _refuse_beside_atlas(model: str | None, tokens: int | None, probe: bool) -> None:
    """What only a run of the model could heed is refused where an atlas is given."""
    given = [name for name, value in (("MODEL", model), ("--tokens", tokens), ("--probe", probe)) if value]
    if given:
        raise typer.BadParameter(
            f"an atlas has its model's figures already; leave out {', '.join(given)}", param_hint="--atlas"
        )


def _watch_corpus(
    loaded: Any, corpus: Path, out: Path, statistics: str, batch: int, tokens: int | None, resume: bool
) -> Any:
    """The atlas of a corpus; None in every process but the first."""
    from rich.progress import Progress

    from regard.tasks.text import most_tokens
    from regard.watch.corpus import watch_corpus

    if loaded.tokenizer is None:
        raise typer.BadParameter(f"{loaded.name!r} has no tokenizer, so it takes no text", param_hint="MODEL")
    with Progress(console=say, disable=not say.is_terminal, transient=True) as bar:
        task = bar.add_task("batches", total=None)
        return watch_corpus(
            loaded.model,
            loaded.tokenizer,
            corpus,
            out,
            statistics=statistics,
            batch_size=batch,
            max_length=tokens,
            most=most_tokens(loaded),
            resume=resume,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _build_report(
    loaded: Any, out: Path, text: Path | None, image: Path | None, tokens: int | None, probe: bool
) -> Any:
    from regard.report.build import build_report

    if _makes_videos(loaded):
        probes = _probes(loaded) if probe else None
        return regard.report(_watch_video(loaded, text, image, "full", tokens), out, title=loaded.name, probes=probes)
    if text is not None:
        source: dict[str, Any] = {"text": _read(text), "tokens": tokens}
        _encode(loaded, source["text"], tokens)
    else:
        source = {"image": image}
    tokenizer = loaded.tokenizer if text is not None else None
    probes = _probes(loaded) if probe else None
    with _working(f"watching {text or image}"):
        return build_report(loaded.model, tokenizer, out=out, title=loaded.name, probes=probes, **source)


def _scan(loaded: Any, task: str, kind: str, prompts: int, length: int, seed: int) -> Any:
    from rich.progress import Progress

    from regard.tasks.heads import TASKS, scan_heads
    from regard.watch.heads import KINDS

    for name, given, accepted in (("--task", task, TASKS), ("--kind", kind, KINDS)):
        if given not in accepted:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(accepted)}", param_hint=name)
    if loaded.tokenizer is None:
        raise typer.BadParameter(f"{loaded.name!r} has no tokenizer, so it takes no prompts", param_hint="MODEL")
    with Progress(console=say, disable=not say.is_terminal, transient=True) as bar:
        shown = bar.add_task(f"heads of {task}", total=None)
        return scan_heads(
            loaded,
            task,
            kind=kind,
            prompts=prompts,
            length=length,
            seed=seed,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )


def _scan_json(found: Any) -> dict[str, Any]:
    """Every head's figures, the most needed first."""
    import numpy as np

    from regard.studies.evidence import bootstrap

    heads: list[dict[str, Any]] = [
        {
            "layer": layer,
            "head": head,
            "increase": float(row.mean()),
            "interval": bootstrap(row, seed=found.attrs["seed"]),
        }
        for layer, rows in enumerate(found.values)
        for head, row in enumerate(rows)
        if not np.isnan(row).any()
    ]
    heads.sort(key=lambda h: -h["increase"])
    return {**found.attrs, "prompts": found.sizes["sample"], "loss": float(found.plain.mean()), "heads": heads}


def _probes(loaded: Any) -> dict[str, Any]:
    from regard.tasks.probes import probe

    if loaded.tokenizer is None or not getattr(loaded.model, "can_generate", lambda: False)():
        raise typer.BadParameter(f"{loaded.name!r} writes no text, so it cannot copy a needle", param_hint="--probe")
    with _working("needles and repeated segments"):
        return probe(loaded)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 text: {error}", param_hint="--text") from error


# -- what is shown ----------------------------------------------------------------------------------------------


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A line with a spinner on stderr while something runs; nothing where stderr is no terminal."""
    with say.status(escape(what)) if say.is_terminal else _nothing():
        yield


@contextmanager
def _telling(what: str) -> Iterator[Any]:
    """As `_working`, with a function that says how far it is."""
    if not say.is_terminal:
        yield lambda line: None
        return
    with say.status(escape(what)) as status:
        yield lambda line: status.update(escape(f"{what}: {line.splitlines()[0]}"))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _print_table(table: Table) -> None:
    # A pipe has no width of its own: rows stay on one line there.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _finite(x: float) -> float | None:
    return x if abs(x) != float("inf") else None


def _evidence(head: dict[str, Any]) -> str:
    """What the primary role rests on, as comparisons; for a mixed head the share of roles that were measured."""
    judged = head["roles"].get(head["role"])
    if judged is None:
        unmeasured = len(head["not_measured"])
        return "no role holds" + (f" ({unmeasured} not measured)" if unmeasured else "")
    checks = [c for c in judged["scores"] if c["passes"]]
    return ", ".join(f"{c['score']} {c['value']:.2f} {c['op']} {c['threshold']:g}" for c in checks)


def _roles_json(table: Any) -> dict[str, Any]:
    return json.loads(table.to_json())


def _print_roles(table: Any) -> None:
    shown = Table("layer", "head", "role", "evidence", "also", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for head in table.evidence.values():
        row = [head["layer"], str(head["head"]), head["role"], _evidence(head), ", ".join(head["also"])]
        shown.add_row(*map(escape, row))
    _print_table(shown)
    _print_counts(table)


def _print_grid(table: Any) -> None:
    """Layers down, heads across: the picture of the model in words."""
    names = table.names
    shown = Table("layer", *(str(h) for h in names["head"].values), box=None, header_style="bold", padding=(0, 2, 0, 0))
    for index, layer in enumerate(names["layer"].values):
        shown.add_row(escape(str(layer)), *(escape(str(r)) for r in names.values[index]))
    _print_table(shown)
    _print_counts(table)


def _print_counts(table: Any) -> None:
    print(", ".join(f"{n} {role}" for role, n in table.counts().items()))
    for role, how in table.not_measured().items():
        if role in ("retrieval", "induction"):
            how = "--probe judges it on a task, where the model writes text"
        Console().print(f"not measured: {role} ({how})", markup=False, highlight=False, style="dim", soft_wrap=True)
