"""Random layers: gate, cached attention, feed-forward, in the forms that passes meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from liquidc.ir import DType, TensorType, Value, ops
from tests.generator.build import WIDTH, Builder
from tests.generator.experts import Routed, mixture, nobody
from tests.generator.expressions import expression

HEADS, HEAD = 2, 4
SCALINGS = ("linear(2.0)", "llama3(4.0, 1.0, 2.0, 8.0)", "yarn(4.0, 2.0, 1.0, 8.0, 0.0, 1.25)")
POLICIES = ("own", "drop", "inherit")
KINDS = ("ungated", "layer", "layer", "nested", "branches", "rows")


@dataclass(frozen=True)
class Cache:
    """Keys, values and lengths of one layer."""

    key: Value
    value: Value
    length: Value


@dataclass
class Step:
    """What the layers of a function share, and what they report."""

    args: dict[str, Value]
    valid: Value
    positions: Value
    executed: Value
    layers: int
    gates: list[tuple[Value, Value]] = field(default_factory=list)
    experts: dict[int, Value] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)
    below: tuple[Value, Value] | None = None

    def cache(self, b: Builder, layer: int) -> Cache:
        """The cache that came in; its length is a row of `kv_len`."""
        row = b.add(ops.Slice(self.args["kv_len"], dim=0, start=layer, stop=layer + 1))
        key, value = (self.args[f"past.{layer}.{part}"] for part in ("key", "value"))
        return Cache(key, value, b.reshape(row, "B"))


def layer(b: Builder, step: Step, x: Value, number: int) -> Value:
    """One layer of a random kind; its cache is added to `step.caches`."""
    kind = b.rng.choice(KINDS)
    label = f"layer{number}"
    if kind == "ungated":
        x, cache = _attention(b, step, x, number, step.valid, step.valid, "own")
        step.caches.append(cache)
        mask = _fixed_gate(b, step, number) if b.chance(30) else step.valid
        routed = _feed_forward(b, x, mask, label, number)
        if isinstance(routed, Routed):
            step.experts[number] = routed.index
        return b.add(ops.Add(x, _output(routed)))
    mask = _gate(b, step, x, number)
    if kind == "branches":
        return _branches(b, step, x, number, mask, label)
    if kind == "rows":
        return _on_rows(b, step, x, number, mask, label)
    return _gated(b, step, x, number, mask, label, nested=kind == "nested")


def _gate(b: Builder, step: Step, x: Value, number: int) -> Value:
    """The mask of a gate with a router of one or two logits."""
    u = b.norm(x)
    if b.chance(50):
        u = b.add(ops.Tanh(b.linear(u, 5)))
        u = b.norm(u) if b.chance(50) else u
    if b.chance(30):
        u = b.linear(u, 5)
    if b.chance(50):
        score = b.reshape(b.linear(u, 1), "B", "T")
    else:
        two = b.linear(u, 2)
        one, zero = (b.add(ops.Slice(two, dim=2, start=i, stop=i + 1)) for i in (1, 0))
        score = b.add(ops.Sub(b.reshape(one, "B", "T"), b.reshape(zero, "B", "T")))
    gate = len(step.gates)
    force = b.add(ops.Slice(step.args["gate_force"], dim=0, start=gate, stop=gate + 1))
    mask, p = b.emit(
        ops.DepthGate(
            score,
            step.valid,
            step.positions,
            b.reshape(force),
            step.args["gate_bias"],
            step.args["min_depth"],
            step.executed,
            layer=number,
            gate=gate,
            remaining=step.layers - number,
            threshold=b.rng.choice((0.5, 0.375, 0.625)),
            compare=b.rng.choice(("gt", "ge")),
            reserved=b.rng.choice((0, 0, 1)),
        )
    )
    step.gates.append((mask, p))
    step.executed = b.add(ops.Add(step.executed, b.add(ops.Cast(mask, to=DType.I64))))
    return mask


def _identity(step: Step, number: int, region: int = 0) -> dict[str, Any]:
    """What a region of the last gate of a layer is, and a lowering; some may not be compacted."""
    gate = len(step.gates) - 1
    lowering = ("", "compact", "", "compact", "branch", "")[gate]
    told = {"role": "gate", "gate": gate, "region": region, "layer": number}
    return {**told, "lowering": lowering}


def _fixed_gate(b: Builder, step: Step, number: int) -> Value:
    """The mask of a gate that was fixed to run; nobody counts it as a gate."""
    return b.emit(ops.FixedGate(step.valid, layer=number, gate=0, run=True, threshold=0.5))[0]


def _output(made: Value | Routed) -> Value:
    return made.y if isinstance(made, Routed) else made


def _feed_forward(b: Builder, x: Value, mask: Value, label: str, number: int) -> Value | Routed:
    """Experts, or maths token by token, of the normed state."""
    u = b.norm(x)
    if b.chance(75):
        return mixture(b, u, mask, label, number)
    return expression(b, u, b.rng.randrange(1, 5))


def _project(b: Builder, u: Value, heads: int, positions: Value | None) -> Value:
    x4 = b.reshape(b.linear(u, heads * HEAD), "B", "T", heads, HEAD)
    return x4 if positions is None else _rotated(b, x4, positions)


def _rotated(b: Builder, x: Value, positions: Value) -> Value:
    scaling = b.rng.choice(("", "", "", *SCALINGS))
    return b.add(ops.Rope(x, positions, theta=100.0, scaling=scaling))


def _seen(b: Builder) -> dict[str, Any]:
    """What an attention sees of its cache, and the scores that take part of it."""
    window, chunk = b.rng.choice(((0, 0), (0, 0), (2, 0), (3, 0), (0, 2), (0, 3)))
    sink = b.weight(HEADS) if b.chance(25) else None
    return {"scale": 0.5, "window": window, "chunk": chunk, "sink": sink}


def _new_entries(b: Builder, step: Step, u: Value) -> tuple[Value, Value]:
    return _project(b, u, 1, step.positions), _project(b, u, 1, None)


def _store(b: Builder, cache: Cache, new: tuple[Value, Value], mask: Value) -> Cache:
    key, value = (
        b.add(ops.Append(old, entry, cache.length, mask))
        for old, entry in zip((cache.key, cache.value), new, strict=True)
    )
    count = b.add(ops.Sum(b.add(ops.Cast(mask, to=DType.I64)), dims=(1,)))
    return Cache(key, value, b.add(ops.Add(cache.length, count)))


def _limit(b: Builder, cache: Cache, mask: Value) -> Value:
    counted = b.add(ops.CumSum(b.add(ops.Cast(mask, to=DType.I64)), dim=1))
    return b.add(ops.Add(b.reshape(cache.length, "B", 1), counted))


def _attention(
    b: Builder, step: Step, x: Value, number: int, mask: Value, cached: Value, policy: str
) -> tuple[Value, Cache]:
    """State with masked attention added, and the cache with the tokens of `cached` appended."""
    old, u = step.cache(b, number), b.norm(x)
    new = _new_entries(b, step, u)
    if policy == "inherit" and step.below is not None:
        new = (b.masked(mask, new[0], step.below[0]), b.masked(mask, new[1], step.below[1]))
    query = _project(b, u, HEADS, step.positions)
    cache = _store(b, old, new, cached)
    limit = _limit(b, old, cached)
    seen = b.add(ops.Attend(query, cache.key, cache.value, limit, **_seen(b)))
    out = b.linear(b.reshape(seen, "B", "T", HEADS * HEAD), WIDTH)
    if mask is not step.valid:
        out = b.masked(mask, out, b.scalar(0.0))
    if number == 0:
        step.below = new
    return b.add(ops.Add(x, out)), cache


def _gated(
    b: Builder, step: Step, x: Value, number: int, mask: Value, label: str, *, nested: bool
) -> Value:
    """Attention and feed-forward in one conditional, as the trace writes it."""
    policy = b.rng.choice(POLICIES) if number else b.rng.choice(("own", "drop"))
    cached = mask if policy == "drop" else step.valid
    old, adapter = step.cache(b, number), b.chance(30)
    shared = b.weight(WIDTH, WIDTH)
    index: list[Value] = []
    own: list[Value] = [b.weight(HEAD, WIDTH), b.weight(HEAD, WIDTH)]

    def entries() -> tuple[Value, Value]:
        """The own policy's keys and values: both arms compute them alike."""
        u = b.add(ops.RMSNorm(x, None, eps=0.01))
        made = [b.reshape(b.add(ops.Linear(u, w)), "B", "T", 1, HEAD) for w in own]
        return _rotated(b, made[0], step.positions), made[1]

    def adapted() -> Value:
        return b.add(ops.Add(x, b.add(ops.Tanh(b.add(ops.Linear(x, shared))))))

    def run() -> list[Value]:
        if policy == "inherit":
            h, cache = _attention(b, step, x, number, mask, cached, policy)
        else:
            u, cache = b.norm(x), _store(b, old, entries(), cached)
            query = _project(b, u, HEADS, step.positions)
            limit = _limit(b, old, cached)
            seen = b.add(ops.Attend(query, cache.key, cache.value, limit, **_seen(b)))
            out = b.linear(b.reshape(seen, "B", "T", HEADS * HEAD), WIDTH)
            h = b.add(ops.Add(x, b.masked(mask, out, b.scalar(0.0))))
        if nested:
            f = _inner(b, step, h, number, mask, label)
        else:
            made = _feed_forward(b, h, mask, label, number)
            index.extend([made.index] if isinstance(made, Routed) else [])
            f = _output(made)
        y = b.add(ops.Add(h, b.masked(mask, f, b.scalar(0.0))))
        y = b.masked(mask, y, adapted()) if adapter else y
        return [y, cache.key, cache.value, *index]

    def skip() -> list[Value]:
        y = adapted() if adapter else x
        none = [nobody(b, i) for i in index]
        if policy == "drop":
            return [y, old.key, old.value, *none]
        entry = step.below if policy == "inherit" and step.below is not None else entries()
        cache = _store(b, old, entry, cached)
        return [y, cache.key, cache.value, *none]

    y, key, value, *chosen = b.conditional(b.any(mask), label, run, skip, **_identity(step, number))
    count = b.add(ops.Sum(b.add(ops.Cast(cached, to=DType.I64)), dims=(1,)))
    step.caches.append(Cache(key, value, b.add(ops.Add(old.length, count))))
    if chosen:
        step.experts[number] = chosen[0]
    return y


def _inner(b: Builder, step: Step, h: Value, number: int, mask: Value, label: str) -> Value:
    """A feed-forward behind a second mask, inside the layer's arm; one result nobody uses."""
    far = b.add(ops.Gt(b.add(ops.Max(h, dims=(2,))), b.scalar(0.75)))
    some = b.add(ops.And(mask, far))

    def run() -> list[Value]:
        made = _output(_feed_forward(b, h, some, f"{label}/ffn", number))
        return [b.masked(some, made, b.scalar(0.0)), made]

    def skip() -> list[Value]:
        return [b.add(ops.Broadcast(b.scalar(0.0), shape=h.shape)), h]

    identity = _identity(step, number, region=1)
    return b.conditional(b.any(some), f"{label}/ffn", run, skip, **identity)[0]


def _branches(b: Builder, step: Step, x: Value, number: int, mask: Value, label: str) -> Value:
    """Two conditionals, for attention and for the feed-forward, the cache outside."""
    old = step.cache(b, number)
    cache = _store(b, old, _new_entries(b, step, b.norm(x)), step.valid)
    step.caches.append(cache)
    limit = _limit(b, old, step.valid)

    def attend() -> list[Value]:
        query = _project(b, b.norm(x), HEADS, step.positions)
        seen = b.add(ops.Attend(query, cache.key, cache.value, limit, **_seen(b)))
        out = b.linear(b.reshape(seen, "B", "T", HEADS * HEAD), WIDTH)
        return [b.add(ops.Add(x, b.masked(mask, out, b.scalar(0.0))))]

    identity = _identity(step, number)
    (h,) = b.conditional(b.any(mask), f"{label}/attn", attend, lambda: [x], **identity)
    second = _gate(b, step, h, number)
    depth = b.rng.randrange(1, 5)

    def forward() -> list[Value]:
        return [b.masked(second, b.add(ops.Add(h, expression(b, b.norm(h), depth))), h)]

    identity = _identity(step, number)
    (y,) = b.conditional(b.any(second), f"{label}/ffn", forward, lambda: [h], **identity)
    return y


def _on_rows(b: Builder, step: Step, x: Value, number: int, mask: Value, label: str) -> Value:
    """A layer under policy drop that is written on rows already."""
    old = step.cache(b, number)
    dim = f"N{len(step.caches)}"

    def run() -> list[Value]:
        rows = b.add(ops.Rows(mask, dim=dim))
        xs = b.add(ops.GatherRows(x, rows))
        positions = b.add(ops.GatherRows(step.positions, rows))
        u = b.norm(xs)
        parts = [b.reshape(b.linear(u, n * HEAD), dim, n, HEAD) for n in (HEADS, 1, 1)]
        query, key = (_rotated(b, part, positions) for part in parts[:2])
        new = (
            b.add(ops.AppendRows(cache, entry, rows, old.length, mask))
            for cache, entry in ((old.key, key), (old.value, parts[2]))
        )
        keys, values = new
        limit = b.add(ops.GatherRows(_limit(b, old, mask), rows))
        seen = b.add(ops.AttendRows(query, keys, values, limit, rows, mask, **_seen(b)))
        out = b.linear(b.reshape(seen, dim, HEADS * HEAD), WIDTH)
        return [b.add(ops.ScatterRows(x, rows, b.add(ops.Add(xs, out)))), keys, values]

    def skip() -> list[Value]:
        return [x, old.key, old.value]

    identity = _identity(step, number)
    y, key, value = b.conditional(b.any(mask), label, run, skip, **identity)
    count = b.add(ops.Sum(b.add(ops.Cast(mask, to=DType.I64)), dims=(1,)))
    step.caches.append(Cache(key, value, b.add(ops.Add(old.length, count))))
    return y


def cache_type() -> TensorType:
    """The type of a cache with one key/value head."""
    return TensorType(DType.F32, ("B", 1, "S", HEAD))
