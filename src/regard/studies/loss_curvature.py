"""Memorisation in the spectrum of loss curvature (arXiv 2510.24256): cut the flat components of MLPs, keep the text.

The testbed knows 100 random strings by heart among ordinary text. K-FAC factors come from clean text alone; of each MLP
matrix the components of largest curvature are kept, as many as hold a share rho of it. The rho is chosen on half of the
strings and of the held-out text, the figures are of the other halves. Random components of equal number and truncated
SVD of equal size are swept over the same rho and chosen in the same way.

The paper sweeps rho from 0.5 to 0.9. Here 16% of the components hold 0.9 of the curvature, and with them the loss rose
by 29% at the first run; the three larger rho were added after seeing that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "loss-curvature"
MODEL = "testbed:recital"
CLAIMS = [
    Claim(
        "mask",
        "the components kept are the largest products that reach rho, as few as do",
        kind="instrument",
        ours="components that differ from a sort of all products, every matrix and rho",
        holds_if="0",
    ),
    Claim(
        "forgets",
        "without its flat components the model no longer recites, and still predicts text",
        kind="mechanism",
        paper="suppresses recitation of untargeted items at lower perplexity than BalancedSubnet (in words)",
        ours="share of strings recited after the cut, exact 16 bytes; the baseline is the whole model",
        holds_if="from at least 0.9 to at most 0.3, held-out loss at most 10% up",
    ),
    Claim(
        "controls",
        "as many random components, or a truncated SVD of equal size, do not do it",
        kind="mechanism",
        ours="least recitation that either reaches with held-out loss at most 10% up, at any rho; the baseline is the "
        "curvature's",
        holds_if="above 0.3",
    ),
    Claim(
        "more-strings",
        "the same with ten times as many strings, whichever layers are cut",
        kind="mechanism",
        ours="share of 1,000 strings recited after the cut, best layers; by layer in the details",
        holds_if="from at least 0.9 to at most 0.3, held-out loss at most 10% up",
    ),
    Claim(
        "open-book",
        "answers that stand in the text survive",
        kind="mechanism",
        paper="open-book facts and logic do not suffer (in words)",
        ours="points of exact match on needles lost by the decoder at the rho chosen; the baseline is before",
        holds_if="at most 10",
    ),
    Claim(
        "arithmetic",
        "arithmetic suffers",
        kind="mechanism",
        paper="arithmetic and closed-book facts suffer (in words)",
        ours="points of accuracy lost by the arithmetic testbed at the rho chosen; the baseline is before",
        holds_if="above those of the needles",
    ),
]
RHOS = (0.5, 0.7, 0.9, 0.95, 0.98, 0.99)
CLEAN_BYTES, TEXT_ROWS, ROWS = 200_000, 128, 128
DRAWS = 5  # of random components, at the rho chosen
MILDER = (0.8, 0.9, 0.95, 0.98, 0.99)  # shares of components that the controls keep besides, for the reason alone
BEFORE, AFTER, LOSS = 0.9, 0.3, 0.10
MATRICES = ("gate_proj", "up_proj", "down_proj")
STRINGS = 1000
FULL_ONLY = "only the full size trains on 1,000 strings, and edits the decoder and the arithmetic testbed"


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Factors from clean text, every edit at every rho, choice on one half and figures on the other."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    layers = list(range(loaded.model.config.num_hidden_layers))
    factors = factored(loaded.model, layers, CLEAN_BYTES, seed)
    findings = [_mask(factors)]
    reason = below_gate(loaded)
    if reason:
        return findings + [Finding(c.id, "not measured", reason=reason) for c in CLAIMS[1:]]
    exam = Exam(loaded.model, 100, seed)
    swept = sweep(loaded.model, factors, exam, seed)
    findings += judge(swept, exam, seed)
    if size == "smoke":
        return findings + [Finding(c.id, "not measured", reason=FULL_ONLY) for c in CLAIMS[3:]]
    rho = swept["curvature"]["rho"]
    return [*findings, _more(device, seed), *_elsewhere(rho, device, seed)]


def factored(model: Any, layers: list[int], count: int, seed: int, text: Any = None) -> Any:
    """The MLP matrices of some layers in the components of K-FAC factors from `count` bytes of training text."""
    import torch

    from regard.tasks.bytetext import StandardLibrary
    from regard.train.curvature import kfac
    from regard.train.cuts import Spectrum

    names = [f"model.layers.{layer}.mlp.{name}" for layer in layers for name in MATRICES]
    generator = torch.Generator().manual_seed(seed)
    rows = StandardLibrary().cut(-(-count // 64), 65, generator) if text is None else text(generator)
    batches = [part.to(model.device) for part in rows.split(ROWS)]
    found = kfac(model, names, batches, generator=generator)
    return {name: Spectrum.of(model.get_submodule(name).weight, found[name]) for name in names}


class Exam:
    """What the strings and the held-out text give: recitation and loss a row, first halves for choosing."""

    def __init__(self, model: Any, strings: int, seed: int) -> None:
        import torch

        from regard.tasks.bytetext import StandardLibrary
        from regard.tasks.recital import RandomStrings

        self.strings = RandomStrings(strings).whole()
        generator = torch.Generator().manual_seed(1_000_003 + seed)
        self.text = StandardLibrary("test").cut(TEXT_ROWS, self.strings.input_ids.shape[1], generator)
        self.plain = self(model)

    def __call__(self, model: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(1 for every string recited, loss in nats of every row of text)."""
        import torch
        from torch import nn

        from regard.tasks.recital import recitation

        losses = []
        with torch.no_grad():
            for ids in self.text.to(model.device).split(ROWS):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                losses.append(each.double().mean(1).cpu().numpy())
        return recitation(model, self.strings).double().numpy(), np.concatenate(losses)

    def rise(self, losses: np.ndarray[Any, Any], half: slice) -> float:
        """Relative rise of the mean loss on half of the rows."""
        return float(losses[half].mean() / self.plain[1][half].mean() - 1)


def first(weight: Any, share: float) -> Any:
    """A mask of the weight's shape whose first share of entries is kept."""
    import torch

    places = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    return places < round(share * weight.numel())


def sweep(model: Any, matrices: Any, exam: Exam, seed: int) -> dict[str, dict[str, Any]]:
    """Every method at every rho, and what `chosen` makes of it; random components are drawn again at their rho."""
    import torch

    from regard.train.cuts import at_random, edited, truncated

    rows: dict[str, list[Any]] = {"curvature": [], "random": [], "svd": []}
    masks = {rho: {name: matrix.top(rho) for name, matrix in matrices.items()} for rho in RHOS}

    def drawn(rho: float, n: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + 1009 * n)
        return {name: matrix.cut(at_random(masks[rho][name], generator)) for name, matrix in matrices.items()}

    for rho in RHOS:
        tried = {
            "curvature": {name: matrix.cut(masks[rho][name]) for name, matrix in matrices.items()},
            "random": drawn(rho, 0),
            "svd": {name: truncated(m.weight, float(masks[rho][name].double().mean())) for name, m in matrices.items()},
        }
        for name, weights in tried.items():
            rows[name].append((rho, *exam(edited(model, weights))))
    found = {name: chosen(each, exam) for name, each in rows.items()}
    one = found["random"]
    again = [exam(edited(model, drawn(one["rho"], n))) for n in range(1, DRAWS)]
    one["recited"] = np.mean([one["recited"], *(r[1::2] for r, _ in again)], 0)
    one["rise"] = float(np.mean([one["rise"], *(exam.rise(losses, slice(1, None, 2)) for _, losses in again)]))
    for n, share in enumerate(MILDER):
        generator = torch.Generator().manual_seed(seed + 7919 * (n + 1))
        some = {name: at_random(first(m.weight, share), generator) for name, m in matrices.items()}
        mild = {
            "random": {name: m.cut(some[name]) for name, m in matrices.items()},
            "svd": {name: truncated(m.weight, share) for name, m in matrices.items()},
        }
        for name, weights in mild.items():
            recited, losses = exam(edited(model, weights))
            half = slice(1, None, 2)
            row = {"kept": share, "recitation": float(recited[half].mean()), "rise": exam.rise(losses, half)}
            found[name].setdefault("milder", []).append(row)
    for each in found.values():
        held = masks[each["rho"]].values()
        each["kept"] = float(sum(m.sum() for m in held) / sum(m.numel() for m in held))
    return found


def chosen(rows: list[Any], exam: Exam) -> dict[str, Any]:
    """The row with the least recitation on the first halves whose loss there is at most 10% up; else the mildest."""
    first, second = slice(0, None, 2), slice(1, None, 2)
    good = [row for row in rows if exam.rise(row[2], first) <= LOSS]
    best = min(good, key=lambda row: row[1][first].mean()) if good else max(rows, key=lambda row: row[0])
    table = [
        {"rho": rho, "recitation": float(recited[second].mean()), "rise": exam.rise(losses, second)}
        for rho, recited, losses in rows
    ]
    return {"rho": best[0], "recited": best[1][second], "rise": exam.rise(best[2], second), "found": bool(good),
            "table": table}  # fmt: skip


def _mask(matrices: Any) -> Finding:
    import torch

    wrong, total = 0, 0
    for matrix in matrices.values():
        products = torch.outer(matrix.lam, matrix.mu).flatten()
        falling, order = products.sort(descending=True)
        for rho in RHOS:
            need = int((falling.cumsum(0) < rho * matrix.lam.sum() * matrix.mu.sum()).sum()) + 1
            mask = torch.zeros_like(products, dtype=torch.bool)
            mask[order[:need]] = True
            wrong += int((mask != matrix.top(rho).flatten()).sum())
            total += len(products)
    return Finding("mask", verdict(wrong == 0), float(wrong), floor=0.0, reason=f"{total} components compared")


def judge(swept: dict[str, dict[str, Any]], exam: Exam, seed: int) -> list[Finding]:
    """Both claims about the strings, on the halves that nothing was chosen on."""
    ours, before = swept["curvature"], exam.plain[0][1::2]
    figure = float(ours["recited"].mean())

    def told(name: str) -> str:
        one = swept[name]
        return (
            f"{name} at rho {one['rho']:g} keeps {one['kept']:.0%} of components: {one['recited'].mean():.2f} recited, "
            f"loss {one['rise']:+.1%}{'' if one['found'] else ' (no rho stays within 10%)'}"
        )

    details = {name: one["table"] + one.get("milder", []) for name, one in swept.items()}
    good = before.mean() >= BEFORE and figure <= AFTER and ours["rise"] <= LOSS
    reason = f"{len(before)} strings, {before.mean():.2f} recited before; {told('curvature')}"
    interval = evidence.bootstrap(ours["recited"], seed=seed)
    found = [
        Finding("forgets", verdict(good), figure, interval, 0.0, 1.0, float(before.mean()), reason, details),
    ]
    least = min(("random", "svd"), key=lambda name: swept[name]["recited"].mean() if swept[name]["found"] else 2.0)
    reason = f"{told('random')}; {told('svd')}; larger ones with the loss at most 10% up: {_milder(swept)}"
    if not swept[least]["found"]:
        least_figure, interval = float(before.mean()), evidence.bootstrap(before, seed=seed)
        reason += "; the figure is that without an edit"
    else:
        least_figure = float(swept[least]["recited"].mean())
        interval = evidence.bootstrap(swept[least]["recited"], seed=seed)
    found.append(
        Finding("controls", verdict(least_figure > AFTER), least_figure, interval, 0.0, 1.0, figure, reason=reason)
    )
    return found


def _milder(swept: dict[str, dict[str, Any]]) -> str:
    """What the controls reach where they keep so much that the text survives."""
    told = []
    for name in ("random", "svd"):
        good = [row for row in swept[name].get("milder", []) if row["rise"] <= LOSS]
        best = min(good, key=lambda row: row["recitation"], default=None)
        shown = (
            "none" if best is None else f"{best['recitation']:.2f} recited at {best['kept']:.0%}, {best['rise']:+.1%}"
        )
        told.append(f"{name} {shown}")
    return ", ".join(told)


def _more(device: str, seed: int) -> Finding:
    """A new model on ten times as many strings; each layer cut alone, then all."""
    from dataclasses import replace

    from regard.tasks import recital
    from regard.train.cuts import edited
    from regard.train.trainer import Trainer

    size = replace(recital.SIZES["full"], strings=STRINGS, every=STRINGS // 10)
    recipe = replace(size.shape.recipe, steps=size.steps)
    size = replace(size, shape=replace(size.shape, recipe=recipe))
    model: Any = recital.build(size, seed).to(device)
    mixture = recital.RecitalMixture(size, seed)

    def batches(step: int) -> Any:
        drawn = mixture(step)
        return type(drawn)(drawn.input_ids.to(device), drawn.weights.to(device))

    Trainer(model, batches, recipe, None).run()
    exam = Exam(model, STRINGS, seed)
    before = exam.plain[0][1::2]
    if before.mean() < BEFORE:
        reason = f"testbed not ready: {before.mean():.2f} of {STRINGS} strings recited, {BEFORE} needed"
        return Finding("more-strings", "not measured", reason=reason)
    count = model.config.num_hidden_layers
    sets: dict[str, list[int]] = {f"layer {n}": [n] for n in range(count)} | {"all": list(range(count))}
    swept = {}
    for name, layers in sets.items():
        factors = factored(model, layers, CLEAN_BYTES, seed)
        rows = [(rho, *exam(edited(model, {n: m.cut(m.top(rho)) for n, m in factors.items()}))) for rho in RHOS]
        swept[name] = chosen(rows, exam)
    best = min(swept, key=lambda name: swept[name]["recited"].mean() if swept[name]["found"] else 2.0)
    one = swept[best]
    figure = float(one["recited"].mean())
    state = verdict(figure <= AFTER and one["rise"] <= LOSS)
    reason = f"{best} at rho {one['rho']:g}, loss {one['rise']:+.1%}; {before.mean():.2f} recited before"
    details = {name: x["table"] for name, x in swept.items()}
    interval = evidence.bootstrap(one["recited"], seed=seed)
    return Finding("more-strings", state, figure, interval, 0.0, 1.0, float(before.mean()), reason, details)


def _elsewhere(rho: float, device: str, seed: int) -> list[Finding]:
    """The same cut on the decoder, judged by needles, and on the arithmetic testbed, each where it is ready."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.arith import Arith3
    from regard.tasks.needle import Needle
    from regard.tasks.recital import recitation
    from regard.tasks.testbeds import TESTBEDS, load
    from regard.train.cuts import edited

    def lost(name: str, task: Any, text: Any) -> tuple[Any, Any] | str:
        if not (TESTBEDS[name] / "model.safetensors").exists():
            return f"no weights of testbed:{name} are shipped"
        loaded = load(f"testbed:{name}", device=device)
        if reason := below_gate(loaded):
            return reason
        layers = list(range(loaded.model.config.num_hidden_layers))
        factors = factored(loaded.model, layers, CLEAN_BYTES, seed, text)
        batch = task.batch(TEXT_ROWS, torch.Generator().manual_seed(seed))
        other = edited(loaded.model, {n: m.cut(m.top(rho)) for n, m in factors.items()})
        return tuple(recitation(m, batch, 16).double().numpy() for m in (loaded.model, other))  # type: ignore[return-value]

    def sums(generator: Any) -> Any:
        return Arith3().batch(CLEAN_BYTES // 8, generator).input_ids

    needles: Callable[[Any], Any] | None = None
    both = {
        "open-book": lost("decoder", Needle(256, split="test"), needles),
        "arithmetic": lost("arith", Arith3("test"), sums),
    }
    found = []
    for claim, got in both.items():
        if isinstance(got, str):
            found.append(Finding(claim, "not measured", reason=got))
            continue
        before, after = got
        points = 100 * (before - after)
        limit = 10.0
        if claim == "arithmetic":
            beside = both["open-book"]
            limit = 10.0 if isinstance(beside, str) else 100 * float((beside[0] - beside[1]).mean())
        figure = float(points.mean())
        state = verdict(figure <= limit if claim == "open-book" else figure > limit)
        reason = f"rho {rho:g}, {len(points)} prompts; compared with {limit:.1f} points"
        interval = evidence.bootstrap(points, seed=seed)
        base = 100 * float(before.mean())
        found.append(Finding(claim, state, figure, interval, floor=0.0, baseline=base, reason=reason))
    return found
