"""The atlas: what was watched, as one labelled dataset that merges exactly.

Dimensions (fixed by what was asked for, so that runs line up):

| dim | labels |
|---|---|
| `layer` | qualified module name of each attention layer, in call order |
| `head`, `head2` | 0 .. most heads of any layer - 1; layers with fewer are NaN beyond `heads[layer]` |
| `offset` | i - j, signed; negative only when some layer looks ahead; |offset| < 256 by default |
| `width` | 1, 2, 4 ... 2^20; mass on |i-j| < width |
| `q_group`, `k_group` | q: "all" and the user's row groups; k: "first" (first token that is not padding) and the user's |
| `bin`, `key_bin`, `q_block`, `k_block` | 32 bins of relative position floor(32 i / length), labels 0 .. 31 |
| `relation` | self, previous, duplicate, induction |
| `template` | "sinks4+window1/16", "sinks4+window1/8", "sinks4+window1/4" (budget in keys: that share of the sample's
| | keys, 4 of them the first four), "diagonal" (|i-j| <= max(1, length // 64)), and the user's |
| `offset_class` | lower bound of i - argmax: 0, 1, 2 (2-3), 4 (4-7), ...; negative for keys ahead |
| `ring` | Chebyshev distance between patches, 0 .. (only with `grid=`) |
| `sample` | str; the user's ids or "0", "1", ... |
| `position`, `key` | 0 .. longest sample - 1, counted from the sample's first token that is not padding |

Coordinates on `layer`: `heads` (int), `kind` ("self" or "cross"), `layer_index` (0, 1, ... in call order), `causal` (bool).
Cross-attention layers have NaN in everything that compares a query's position with a key's.

Variables, their dimensions, units and merge rules: the table in `regard.watch.variables` (`VARIABLES`). All sums are float64;
per-sample arrays are float32. A variable is present only if it was asked for; `atlas.need(name)` says how to ask.

`attrs`: `format` (int), `model`, `model_class`, `fingerprint`, `statistics` (JSON), `provenance` (JSON list, one entry a run:
versions, seed, date, command, device, dtype).
"""
