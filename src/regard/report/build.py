"""The page: one HTML file with everything in it, written from an atlas or straight from a model and a text."""

from __future__ import annotations

import contextlib
import html
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor, nn

from regard import __version__
from regard.measures.roles import RoleTable, name_heads
from regard.measures.scores import role_scores
from regard.watch.atlas import Atlas
from regard.watch.recorder import Watch, token_texts, watch

from . import frame
from .pack import script_json
from .payload import Extras, Picture, payload
from .picture import as_inputs, patch_grid, png
from .taxonomy import UNJUDGED
from .windows import LIMIT, Closeup, Window, close_up

SCRIPTS = ("data", "dom", "draw", "grid", "head", "layers", "picture", "tokens", "theme", "main")
FINE = 128
CELLS = 1_300_000
"""Exact weights a page holds by default: with the rest about 4 MB for 12 x 12 heads."""
CELLS_WHOLE = 6_500_000
"""The same where one window shows the whole input, which then needs no finer block map."""


@dataclass(frozen=True)
class Report:
    """A page that was written: where, its size in bytes, and the atlas and roles it shows."""

    path: Path
    size: int
    atlas: Atlas
    roles: RoleTable

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        """The page itself in a notebook, in a frame that may run its script and nothing more."""
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe sandbox="allow-scripts" srcdoc="{page}" style="width:100%;height:900px;border:0"></iframe>'


def report(
    atlas: Atlas,
    path: str | os.PathLike[str],
    *,
    windows: Mapping[str, Closeup] | None = None,
    title: str | None = None,
    summary: str | None = None,
    extras: Extras | None = None,
    probes: Mapping[str, Atlas] | None = None,
) -> Report:
    """Write the page of an atlas: maps, roles, evidence, profiles; one file, no network, light and dark.

    Args:
        atlas: what `regard.watch` gathered, loaded or merged.
        path: the HTML file to write; its folder must exist.
        windows: close-ups by layer (`regard.report.windows.close_up`), for exact weights and the token view, which an
            atlas alone does not hold; `build_report` takes them itself.
        title: heading of the page; default the model's name.
        summary: a line about the text; default its first tokens.
        extras: token axes, a picture, the first query; `build_report` fills it.
        probes: role scores to take from another atlas of the same model, `{"retrieval": atlas, "induction": atlas}`:
            some roles are judged by a task (needles, repeated tokens) and not by the text on the page.

    Raises:
        AtlasError: the atlas holds no attention layer or lacks what roles are judged by.
    """
    extras = extras or Extras()
    if windows is not None:
        extras = replace(extras, closeups=windows)
    table = judge(atlas, probes or {})
    page = render(atlas, table, extras, title=title, summary=summary, probes=tuple(probes or ()))
    path = Path(path)
    path.write_text(page, encoding="utf-8", newline="\n")
    return Report(path, len(page.encode("utf-8")), atlas, table)


def build_report(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    text: str | None = None,
    image: Any = None,
    inputs: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] = "report.html",
    windows: Sequence[tuple[int, int]] | None = None,
    title: str | None = None,
    tokens: int | None = None,
    probes: Mapping[str, Atlas] | None = None,
) -> Report:
    """Watch a model on one text, picture or batch of one, and write the page.

    Args:
        model: any model whose attention goes through `scaled_dot_product_attention`.
        tokenizer: the text's tokenizer, or the picture's processor (a transformers image processor, or a callable
            from a PIL image to a tensor [3, height, width]); None takes the size and the mean from the model's config.
        text: the text to watch.
        image: a picture to watch instead: a path or a PIL image.
        inputs: the model's own keyword arguments instead, a batch of one.
        out: the HTML file to write.
        windows: (start, stop) of the tokens to show exactly, at most 256 each. None: all of a short input; of a long
            one its last tokens, as many as the page has room for.
        title: heading of the page; default the model's name.
        tokens: take only so many tokens of the text; None takes all or refuses.
        probes: as for `report`.

    Raises:
        ValueError: not exactly one of text, image, inputs; a text without tokenizer or longer than the model takes; a
            window past the end or larger than 256; a batch larger than one.
    """
    given = [name for name, v in (("text", text), ("image", image), ("inputs", inputs)) if v is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of text, image, inputs; got {', '.join(given) or 'none'}")
    shown: Tensor | None = None
    if text is not None:
        from regard.tasks.testbeds import Loaded
        from regard.tasks.text import encode

        ready = encode(Loaded(model, tokenizer, _name(model)), text, tokens)
    elif image is not None:
        ready, shown = as_inputs(model, image, tokenizer)
    else:
        assert inputs is not None
        ready = dict(inputs)
    batch = next((v.shape[0] for v in ready.values() if isinstance(v, Tensor) and v.ndim), 1)
    if batch != 1:
        raise ValueError(f"inputs hold a batch of {batch}; a page shows one sample: give a batch of 1")
    with _evaluating(model), torch.no_grad():
        lengths = _lengths(model, ready)
        chosen, whole = _choose(windows, lengths)
        longest = max(max(q, k) for _, q, k, _ in lengths)
        closeups = close_up(model, ready, chosen, blocks=FINE if longest > 2 * FINE and not whole else None)
        picture, grid, prefix = None, None, 1
        if shown is not None:
            grid, prefix = patch_grid(model, shown, max(c.q_len for c in closeups.values()))
            if grid is not None:
                picture = Picture(png(shown), (shown.shape[2], shown.shape[1]), grid, prefix)
        settings = Watch(per_sample=("received_raw",), grid=grid, prefix=prefix)
        with watch(model, statistics=settings, tokenizer=None if image is not None else tokenizer) as seen:
            model(**ready)
    axes, axis_of = _axes(model, tokenizer if image is None else None, ready, closeups, picture)
    extras = Extras(closeups, axes, axis_of, picture, query=_first_query(picture, chosen))
    name = os.path.basename(str(image)) if isinstance(image, str | os.PathLike) else "a picture"
    summary = text if text is not None else name if image is not None else None
    return report(seen.atlas, out, title=title, summary=summary, extras=extras, probes=probes)


def judge(atlas: Atlas, probes: Mapping[str, Atlas]) -> RoleTable:
    """Roles of the atlas's heads, the scores of some roles taken from other atlases of the same model."""
    scores = role_scores(atlas).copy()
    labels = [str(label) for label in scores["role"].values]
    missing = dict(scores.attrs.get("missing", {}))
    for role, probe in probes.items():
        own = [label for label in labels if label == role or label.startswith(f"{role}/")]
        if not own:
            raise ValueError(f"probes: no role {role!r}; roles are {', '.join(x for x in labels if '/' not in x)}")
        other = role_scores(probe)
        if other["layer"].values.tolist() != scores["layer"].values.tolist() or other.shape[1] != scores.shape[1]:
            raise ValueError(f"probes: the atlas for {role!r} has other layers or heads than the atlas shown")
        scores.loc[{"role": own}] = other.sel(role=own).transpose(*scores.dims).values
        missing = {k: v for k, v in missing.items() if k not in own} | {
            k: v for k, v in other.attrs.get("missing", {}).items() if k in own
        }
    scores.attrs["missing"] = missing
    return name_heads(scores)


def render(
    atlas: Atlas,
    table: RoleTable,
    extras: Extras,
    *,
    title: str | None = None,
    summary: str | None = None,
    probes: Sequence[str] = (),
) -> str:
    """The page as a string."""
    header, blob = payload(atlas, table, extras)
    style, script = frame.style(), frame.script(SCRIPTS)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(frame.page_file("page.html.j2"))
    return page.render(
        title=_short(title) if title else _title(atlas),
        excerpt=_excerpt(summary, header),
        facts=_facts(atlas, header),
        notes=_notes(atlas, header, table.not_measured(), probes),
        received_note=_received_note(header),
        picture=extras.picture is not None,
        version=__version__,
        date=_date(atlas),
        # What follows is ours alone, or escaped for where it stands.
        style=Markup(style),
        script=Markup(script),
        style_hash=frame.digest(style),
        script_hash=frame.digest(script),
        header=Markup(script_json(header)),
        arrays=Markup(blob.base64()),
    )


# -- what to look at -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _lengths(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[int, int, int, bool]]:
    """(heads, q_len, kv_len, causal) of every attention call, by a run that computes nothing beside the model."""
    from regard.watch.seam import Seam

    found: list[tuple[int, int, int, bool]] = []
    with Seam(model, lambda call: found.append((call.q.shape[1], call.q.shape[2], call.k.shape[2], call.causal))):
        model(**inputs)
    return found


def _choose(
    windows: Sequence[tuple[int, int]] | None, lengths: Sequence[tuple[int, int, int, bool]]
) -> tuple[list[Window], bool]:
    """The windows to take exactly, and whether one of them is the whole input."""
    longest = max(max(q, k) for _, q, k, _ in lengths)
    if windows is not None:
        for a, b in windows:
            if b > longest:
                raise ValueError(f"windows: ({a}, {b}) ends past the {longest} tokens")
        return [Window((a, b), (a, b)) for a, b in windows], (0, longest) in [tuple(w) for w in windows]
    whole = sum(_cells(h, q, k, c) for h, q, k, c in lengths)
    if longest <= LIMIT and whole <= CELLS_WHOLE:
        return [Window((0, longest), (0, longest))], True
    for width in (256, 224, 192, 160, 128, 112, 96, 80, 64, 48, 32, 16):
        cells = sum(_cells(h, min(width, q), min(width, k), c) for h, q, k, c in lengths)
        if cells <= CELLS and width <= longest:
            return [Window((longest - width, longest), (longest - width, longest))], False
    raise ValueError(f"a model of {sum(x[0] for x in lengths)} heads leaves no room for exact windows: pass windows=[]")


def _cells(heads: int, q_len: int, kv_len: int, causal: bool) -> int:
    return heads * (q_len * (q_len + 1) // 2 if causal and q_len == kv_len else q_len * kv_len)


def _axes(
    model: nn.Module,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    closeups: Mapping[str, Closeup],
    picture: Picture | None,
) -> tuple[list[list[str]] | None, dict[str, tuple[int, int]]]:
    """Token texts of each sequence, and which of them each layer's queries and keys are."""
    if picture is not None:
        rows, cols = picture.grid
        extra = ["[CLS]", *(f"[REG{i}]" for i in range(1, picture.prefix))][: picture.prefix]
        return [[*extra, *(f"r{r}c{c}" for r in range(rows) for c in range(cols))]], {}
    if tokenizer is None or not isinstance(inputs.get("input_ids"), Tensor):
        return None, {}
    axes = [token_texts(tokenizer, inputs["input_ids"][0].cpu().numpy()).tolist()]
    axis_of: dict[str, tuple[int, int]] = {}
    decoder = inputs.get("decoder_input_ids")
    if isinstance(decoder, Tensor):
        axes.append(token_texts(tokenizer, decoder[0].cpu().numpy()).tolist())
        for name, seen in closeups.items():
            own = 1 if "decoder" in name else 0
            axis_of[name] = (own, 0 if seen.kind == "cross" else own)
    return axes, axis_of


def _first_query(picture: Picture | None, windows: Sequence[Window]) -> int | None:
    if not windows or picture is None:
        return None
    rows, cols = picture.grid
    middle = picture.prefix + (rows // 2) * cols + cols // 2
    a, b = windows[0].rows
    return middle if a <= middle < b else None


# -- the frame's words -----------------------------------------------------------------------------------------------


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _title(atlas: Atlas) -> str:
    name = str(atlas.attrs.get("model", "")).rstrip("/\\")
    return _short(name) or "Attention heads"


def _short(name: str) -> str:
    """A folder's last part names the model; the rest of the path is nobody's business."""
    return os.path.basename(name.rstrip("/\\")) if os.path.isabs(name) else name


def _date(atlas: Atlas) -> str:
    runs = atlas.provenance
    return str(runs[-1].get("date", ""))[:10] if runs else datetime.now(UTC).date().isoformat()


def _excerpt(summary: str | None, header: Mapping[str, Any]) -> str:
    text = summary if summary is not None else "".join(header["axes"][0]) if header["axes"] else ""
    text = " ".join(text.split())
    return text if len(text) <= 320 else text[:320].rstrip() + " …"


def _facts(atlas: Atlas, header: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs = atlas.provenance
    run = runs[-1] if runs else {}
    facts = [("Model", str(atlas.attrs.get("model_class", "")).rpartition(".")[2] or "unknown")]
    if run.get("parameters"):
        facts.append(("Parameters", f"{run['parameters']:,}"))
    counts = [layer["heads"] for layer in header["layers"]]
    same = len(set(counts)) == 1
    facts.append(("Heads", f"{len(counts)} layers × {counts[0]}" if same else f"{sum(counts)} in {len(counts)} layers"))
    if "n_tokens" in atlas and atlas["n_tokens"].size:
        n = atlas["n_tokens"].values
        facts.append(("Tokens", f"{int(n.sum()):,}" if n.size == 1 else f"{int(n.sum()):,} in {n.size} samples"))
    if runs:
        facts.append(("Watched", str(run.get("date", "")).replace("T", " ").replace("+00:00", " UTC")))
        facts.append(("Precision", f"{run.get('dtype', '?')} on {run.get('device', '?')}"))
        versions = run.get("versions", {})
        shown = [f"{k} {versions[k]}" for k in ("regard", "torch", "transformers") if versions.get(k)]
        facts.append(("Versions", " · ".join(shown)))
    return facts


def _received_note(header: Mapping[str, Any]) -> str:
    figure = (header["received"] or {}).get("figure")
    if figure == "mass":
        return "The twenty keys that get the largest share of all the mass this head gives."
    return "The twenty keys with the largest mean weight from the queries that may see them."


def _notes(
    atlas: Atlas, header: Mapping[str, Any], unmeasured: Mapping[str, str], probes: Sequence[str]
) -> list[tuple[str, str]]:
    """What each figure means and how exact it is, in plain words."""
    quant = header["quant"]
    error = 100 * ((1 / quant["floor"]) ** (0.5 / (quant["levels"] - 1)) - 1)
    statistics = json.loads(atlas.attrs.get("statistics", "{}"))
    names = statistics.get("statistics") if isinstance(statistics, dict) else None
    notes = [
        (
            "What is exact",
            "Measures, scores and profiles are computed from every weight of the text, in one pass over the model’s "
            "own queries and keys; the matrix is never stored. Maps and windows keep each value in one byte: "
            f"within ±{error:.1f}% of itself, below {quant['floor']:.0e} shown as less than that.",
        ),
        (
            "Maps",
            "A block map shows, for a block of queries, which share of their mass each block of keys gets; it covers "
            "the whole text. Exact windows show single weights, normalised over all keys, inside the window or not.",
        ),
        (
            "Under window + sinks",
            "The mass a query keeps when it may see only the first (up to four) tokens and a recent window is "
            "exp(lse of those keys − lse of all keys), averaged over queries. What is missing is lost.",
        ),
        (
            "Roles",
            "Several roles may hold for a head; its primary role is the first that holds in the table’s order, from "
            "specific to general. A head with none is mixed. Every threshold is shown with its source.",
        ),
    ]
    if probes:
        notes.append(
            ("Judged on tasks", f"{', '.join(probes)}: scores from prompts made for the purpose, not this text.")
        )
    if unmeasured:
        reasons: dict[str, list[str]] = {}
        for role, why in unmeasured.items():
            reasons.setdefault(UNJUDGED.get(role, why), []).append(role)
        words = " ".join(f"{', '.join(r)[0].upper()}{', '.join(r)[1:]}: {why}." for why, r in reasons.items())
        notes.append(("Not judged here", words))
    watched = f"Statistics: {', '.join(names) if isinstance(names, list) else names}. " if names else ""
    runs = atlas.provenance
    if runs:
        run = runs[-1]
        watched += f"{len(runs)} run{'s' if len(runs) > 1 else ''}, seed {run.get('seed', '?')}, "
        watched += f"Python {run.get('python', platform.python_version())}, fingerprint of the weights "
        watched += f"{atlas.attrs.get('fingerprint', '?')}."
    if watched:
        notes.append(("Provenance", watched))
    return notes
