"""Routers and experts, as a chain of conditional regions, as `map_experts` or grouped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liquidc.ir import Block, DType, Value, ops
from liquidc.ir import weights as lazy
from tests.generator.build import WIDTH, Builder

HIDDEN = 6


@dataclass(frozen=True)
class Routed:
    """A routed feed-forward: its output f32[B, T, W] and the experts chosen i64[B, T, k]."""

    y: Value
    index: Value


def mixture(b: Builder, x: Value, mask: Value, label: str, layer: int) -> Routed:
    """Experts over the tokens of `mask`; the others get -1 and 0."""
    count = b.rng.choice((2, 4, 8))
    identity = 2 if b.chance(25) else 0
    index, weight = router(b, x, mask, count + identity)
    apply = b.rng.choice(("output", "input"))
    if b.chance(10):
        table = [b.rng.randrange(count + identity) for _ in range(count + identity)]
        if apply == "input":  # shares of one expert add up behind it, not before
            b.rng.shuffle(table := [*range(count + identity)])
        index = b.add(ops.Renumber(index, table=table))
    body = b.rng.choice(BODIES)
    stacks = [b.stack(count, *shape) for shape in body.shapes]
    form = b.rng.choice(("regions", "regions", "mapped", "grouped", "grouped"))
    if form == "regions":
        experts = [*zip(*stacks, strict=True), *[()] * identity]
        y = _regions(b, x, index, weight, experts, body, apply, label, layer)
    elif form == "mapped":
        y = _mapped(b, x, index, weight, stacks, body, apply)
    else:
        stored = b.chance(80)
        shapes = ((count, 2 * HIDDEN, WIDTH), (count, WIDTH, HIDDEN))
        gate_up, down = (_stacked(b, shape, stored=stored) for shape in shapes)
        y = b.add(ops.GroupedExperts(x, index, weight, gate_up, down, apply=apply))
    return Routed(_with_shared(b, x, y) if b.chance(60) else y, index)


def _stacked(b: Builder, shape: tuple[int, int, int], *, stored: bool) -> Value:
    """The weights of all experts, stored as such or computed from one matrix."""
    count, rows, columns = shape
    return b.weight(*shape) if stored else b.reshape(b.weight(count * rows, columns), *shape)


def _with_shared(b: Builder, x: Value, y: Value) -> Value:
    """A shared expert beside the others: as wide, twice as wide, or of another width."""
    width = 4 if b.chance(10) else b.rng.choice((HIDDEN, 2 * HIDDEN))
    if b.chance(30):
        both = b.add(ops.Linear(x, b.weight(2 * width, WIDTH)))
        cuts = ((0, width), (width, 2 * width))
        gate, up = (b.add(ops.Slice(both, dim=2, start=i, stop=j)) for i, j in cuts)
    else:
        gate, up = (b.add(ops.Linear(x, b.weight(width, WIDTH))) for _ in range(2))
    hidden = b.add(ops.Mul(b.add(ops.SiLU(gate)), up))
    shared = b.add(ops.Linear(hidden, b.weight(WIDTH, width)))
    if b.chance(50):
        shared = b.add(ops.Mul(shared, b.add(ops.Sigmoid(b.linear(x, 1)))))
    return b.add(ops.Add(*b.rng.sample((y, shared), 2)))


def router(b: Builder, x: Value, mask: Value, count: int) -> list[Value]:
    """Indices and weights of a router over `count` experts."""
    logits = b.linear(x, count)
    if b.chance(30):
        logits = b.add(ops.Add(logits, b.weight(count)))
    groups = b.rng.choice((1, 1, 2))
    return b.emit(
        ops.Route(
            logits,
            mask,
            b.weight(count) if b.chance(30) else None,
            k=b.rng.choice((1, 2, 2) if count // groups > 1 else (1,)),
            score=b.rng.choice(("softmax", "sigmoid")),
            post=b.rng.choice(("none", "renorm", "softmax_k", "sigmoid")),
            renorm_eps=0.01,
            n_group=groups,
            group_score=b.rng.choice(("max", "top2sum")),
            scaling=b.rng.choice((1.0, 1.5)),
        )
    )


@dataclass(frozen=True)
class Body:
    """An expert: the shapes of its weights, and its maths."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    def emit(self, b: Builder, x: Value, params: Sequence[Value]) -> Value:
        """The expert's output for x [B, T, W]."""
        match self.name:
            case "together":
                both = b.add(ops.Linear(x, params[0]))
                gate = b.add(ops.Slice(both, dim=2, start=0, stop=HIDDEN))
                up = b.add(ops.Slice(both, dim=2, start=HIDDEN, stop=2 * HIDDEN))
                hidden = b.add(ops.Mul(b.add(ops.SiLU(gate)), up))
                return b.add(ops.Linear(hidden, params[1]))
            case "apart":
                gate, up = (b.add(ops.Linear(x, p)) for p in params[:2])
                hidden = b.add(ops.Mul(up, b.add(ops.SiLU(gate))))
                return b.add(ops.Linear(hidden, params[2]))
            case "biased":
                hidden = b.add(ops.Tanh(b.add(ops.Linear(x, params[0], params[1]))))
                return b.add(ops.Mul(hidden, x))
            case _:
                three = b.add(ops.Broadcast(b.scalar(0.5), shape=x.shape))
                share = b.add(ops.Softmax(b.add(ops.Linear(x, params[0])), dim=2))
                return b.add(ops.Mul(share, three))


BODIES = (
    Body("together", ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))),
    Body("apart", ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))),
    Body("biased", ((WIDTH, WIDTH), (WIDTH,))),
    Body("shares", ((WIDTH, WIDTH),)),
)


def _regions(
    b: Builder,
    x: Value,
    index: Value,
    weight: Value,
    experts: Sequence[Sequence[str]],
    body: Body,
    apply: str,
    label: str,
    layer: int,
) -> Value:
    """A region for each expert, by the names of its weights; one without any is the identity."""
    total = b.add(ops.Broadcast(b.scalar(0.0), shape=x.shape))
    for expert, names in enumerate(experts):
        used = b.add(ops.ExpertMask(index, expert=expert))

        def run(
            expert: int = expert,
            names: Sequence[str] = names,
            used: Value = used,
            total: Value = total,
        ) -> list[Value]:
            share = b.add(ops.ExpertWeight(index, weight, expert=expert))
            share = b.reshape(share, "B", "T", 1)
            params = [b.read(name) for name in names]
            if not params:
                y = b.add(ops.Mul(x, share))
            elif apply == "input":
                y = body.emit(b, b.add(ops.Mul(x, share)), params)
            else:
                y = b.add(ops.Mul(body.emit(b, x, params), share))
            return [b.add(ops.Add(total, b.masked(used, y, b.scalar(0.0))))]

        def skip(total: Value = total) -> list[Value]:
            return [total]

        identity = {"role": "expert", "layer": layer, "expert": expert}
        name = f"{label}/expert{expert}"
        (total,) = b.conditional(b.any(used), name, run, skip, **identity)
    return total


def _mapped(
    b: Builder,
    x: Value,
    index: Value,
    weight: Value,
    stacks: Sequence[Sequence[str]],
    body: Body,
    apply: str,
) -> Value:
    params: list[Value] = []
    for names in stacks:
        expr = lazy.stack([b.module.weights[name] for name in names])
        params.append(b.declared(names[0].rsplit(".", 1)[0], expr))
    types = [x.type, *(p.type.with_shape(*p.shape[1:]) for p in params)]
    block = Block([(f"arg{i}", type) for i, type in enumerate(types)])
    with b.inside(block):
        b.emit(ops.Yield([body.emit(b, block.args[0], block.args[1:])]))
    return b.add(ops.MapExperts(x, index, weight, params, apply=apply, body=block))


def nobody(b: Builder, index: Value) -> Value:
    """What a skipped layer says of its experts: -1 everywhere."""
    return b.add(ops.Broadcast(b.scalar(-1, DType.I64), shape=index.shape))
