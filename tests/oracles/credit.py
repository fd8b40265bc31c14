"""Credit of tokens and the policy's loss, token by token, from the words of the papers."""

from __future__ import annotations

import math

import numpy as np


def rhythm(weights, start, window, near, far, share):
    """WAAD and FAI from a list of [batch, heads, n, n]."""
    p = np.concatenate([np.asarray(w, float) for w in weights], 1)
    batch, heads, n, _ = p.shape
    distance = []
    for h in range(heads):
        rows = [sum(p[b, h, t, s] * (t - s) for s in range(t + 1)) for b in range(batch) for t in range(start, n)]
        distance.append(np.mean(rows))
    order = sorted(range(heads), key=lambda h: distance[h])
    k = max(1, round(share * heads))
    local, distant = p[:, order[:k]].mean(1), p[:, order[-k:]].mean(1)
    waad, fai = np.zeros((batch, n - start)), np.full((batch, n - start), np.nan)
    for b in range(batch):
        for t in range(start, n):
            waad[b, t - start] = sum(local[b, t, s] * min(t - s, window) for s in range(t + 1))
            later = [distant[b, u, t] for u in range(max(start, t + near), min(n, t + far + 1))]
            if later:
                fai[b, t - start] = np.mean(later)
    return waad, fai


def token_gain(waad, fai, strategy, a=0.5):
    """One response, lists of floats."""
    n = len(waad)
    jump = [abs(waad[t] - waad[t + 1]) for t in range(n - 1)] + [math.nan]
    count = max(1, round(0.4 * n))

    def largest(x):
        seen = [t for t in range(n) if not math.isnan(x[t])]
        return set(sorted(seen, key=lambda t: -x[t])[:count])

    if strategy == "local":
        return [1.5 if t in largest(jump) else 1.0 for t in range(n)]
    anchors = largest(fai)
    gain = [1.5 if t in anchors else 1.0 for t in range(n)]
    if strategy == "global":
        return gain
    median = sorted(waad)[(n - 1) // 2]
    bound = np.quantile([x for x in jump if not math.isnan(x)], 0.6)
    claims = []
    for t in sorted(anchors):
        before = list(range(max(0, t - 3), t))
        if waad[t] <= median and any(jump[u] >= bound for u in before):
            gain[t] = 1 + (1 - a) / 2
            claims.append(max(before, key=lambda u: jump[u]))
    for u in claims:
        gain[u] = max(gain[u], 1 + a / 2)
    return gain


def grpo_loss(logp, old, rewards, gain, clip):
    """Answers [prompts][group][tokens] as nested lists."""
    total, answers = 0.0, 0
    for prompt, group in enumerate(rewards):
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        for g, r in enumerate(group):
            advantage = (r - mean) / (std + 1e-6)
            tokens = []
            for t in range(len(logp[prompt][g])):
                ratio = math.exp(logp[prompt][g][t] - old[prompt][g][t])
                scaled = gain[prompt][g][t] * advantage
                tokens.append(min(ratio * scaled, min(max(ratio, 1 - clip), 1 + clip) * scaled))
            total += sum(tokens) / len(tokens)
            answers += 1
    return -total / answers
