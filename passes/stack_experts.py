"""The pass `stack-experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from liquidc.ir import Block, Module, Op, Value, ops
from liquidc.ir import weights as lazy
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.passes.base import Pass, PassContext
from liquidc.passes.eliminate_common import signature
from liquidc.passes.expert_regions import is_region, next_region, region_of
from liquidc.passes.fold_constants import declare, splat


@dataclass(frozen=True)
class StackExperts(Pass):
    """A chain of conditional regions, one for each expert, becomes one `map_experts`.

    Before::

        %y1 = if any(%m0) { ... %h = linear %x, %w0 ... yield %y0 + where(%m0, %s · %h, 0) } ...
        %y2 = if any(%m1) { ... %h = linear %x, %w1 ... yield %y1 + where(%m1, %s · %h, 0) } ...

    After::

        %y2 = map_experts %x, %index, %weight, [%w] (%e: f32[B, T, 8], %p: f32[4, 8]) {
          %h = linear %e, %p
          yield %h
        }                                                     (w = stack([w0, w1]))
    """

    name: ClassVar[str] = "stack-experts"
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]] = "bitwise"

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """Stack every chain that starts at zero."""
        for function in module.functions.values():
            self._block(module, function.body, statistics)

    def _block(self, module: Module, block: Block, statistics: Statistics) -> None:
        for op in list(block.ops):
            for inner in op.regions.values():
                self._block(module, inner, statistics)
            if isinstance(op, ops.If) and op.parent is block and _is_first(op):
                try:
                    _stack(module, block, op)
                    statistics.fired[self.name] += 1
                except Refusal as refusal:
                    statistics.refuse(self.name, op, refusal)


@dataclass(frozen=True)
class _Region:
    """One expert's region, taken apart."""

    op: ops.If
    index: Value
    weight: Value
    x: Value
    apply: str
    expert: int
    body: tuple[Op, ...]
    y: Value
    total: Value


def _is_first(op: ops.If) -> bool:
    ends = op.otherwise.terminator.operands
    return is_region(op) and len(ends) == 1 and splat(ends[0]) == 0


def _stack(module: Module, block: Block, first: ops.If) -> None:
    rw = Rewriter(block, [])
    chain = [_take_apart(first, rw)]
    while (following := next_region(chain[-1].op)) is not None:
        chain.append(_take_apart(following, rw))
    count = len(chain)
    rw.check(count > 1, "there is only one expert")
    rw.check([r.expert for r in chain] == list(range(count)), "the experts are not in order")
    head = chain[0]
    for region in chain[1:]:
        same = (region.index, region.weight, region.x, region.apply)
        rw.check(same == (head.index, head.weight, head.x, head.apply), "the tokens differ")
        rw.check(len(region.body) == len(head.body), "the bodies differ")
    params = _stacked_params(module, rw, chain)
    body = _body(rw, head, params)
    op = rw.emit(
        ops.MapExperts(
            head.x,
            head.index,
            head.weight,
            [p.stacked for p in params],
            apply=head.apply,
            body=body,
        )
    )
    last = chain[-1].op
    op.y.name = last.results[0].name
    last.results[0].replace_by(op.y)
    place = block.ops.index(last)
    block.ops[place:place] = rw.emitted
    for region in reversed(chain):
        block.ops.remove(region.op)
        region.op.forget()


def _take_apart(op: ops.If, rw: Rewriter) -> _Region:
    """The parts of `total + where(used, [share ·] y, 0)`."""
    region = region_of(op, rw)
    expert, kept = region.used.expert, region.added
    inside = {id(inner) for inner in op.then.ops}
    scaled = kept.op
    share = region.share(scaled.b) if isinstance(scaled, ops.Mul) else None
    apply, y = ("output", cast(ops.Mul, scaled).a) if share else ("input", kept)
    body: list[Op] = []
    x: Value | None = None
    for inner in op.then.ops:
        if apply == "input" and isinstance(inner, ops.Mul) and x is None:
            share = share or region.share(inner.b)
            x = inner.y if share else None
    share = rw.need(share, ops.ExpertWeight, "no weight of the expert is applied")
    body = _between(y, inside, x)
    made = {v for b in body for v in b.results}
    read = {v for b in body for v in b.operands if not isinstance(v.op, ops.Weight)} - made
    alone = len(read) == 1 if x is None else read == {x}
    rw.check(alone, "the body reads more than the tokens and its weights")
    source = next(iter(read)) if x is None else cast(ops.Mul, x.op).a
    rw.check(y.dtype == source.dtype, "the body computes in another type than its tokens")
    return _Region(
        op, share.index, share.weight, source, apply, expert, tuple(body), y, region.total
    )


def _between(y: Value, inside: set[int], x: Value | None) -> list[Op]:
    """The ops of the region that `y` needs, weights and what makes x left out, in order."""
    needed: dict[int, Op] = {}
    pending = [y]
    while pending:
        value = pending.pop()
        op = value.op
        if value is x or op is None or id(op) not in inside or isinstance(op, ops.Weight):
            continue
        if id(op) not in needed:
            needed[id(op)] = op
            pending += op.operands
    order = list(cast(Block, next(iter(needed.values())).parent).ops) if needed else []
    return [op for op in order if id(op) in needed]


@dataclass(frozen=True)
class _Param:
    """A weight of the first expert, and the stack of all experts' weights in its place."""

    first: Value
    stacked: Value


def _stacked_params(module: Module, rw: Rewriter, chain: Sequence[_Region]) -> list[_Param]:
    """Check that the bodies are alike but for weights, and stack those."""
    head = chain[0]
    groups: dict[Value, list[str]] = {}
    maps: list[dict[Value, Value]] = [{} for _ in chain]
    for step, op in enumerate(head.body):
        for region, mapping in zip(chain, maps, strict=True):
            other = region.body[step]
            translated = [mapping.get(v, v) for v in other.operands]
            weights = [i for i, v in enumerate(op.operands) if isinstance(v.op, ops.Weight)]
            for i in weights:
                name = rw.need(other.operands[i].op, ops.Weight, "the bodies differ").weight
                groups.setdefault(op.operands[i], [])
                place = chain.index(region)
                if len(groups[op.operands[i]]) == place:
                    groups[op.operands[i]].append(name)
                rw.check(groups[op.operands[i]][place] == name, "weights are shared differently")
                translated[i] = op.operands[i]
            if region.apply == "input":
                translated = [_unscaled(v, head) for v in translated]
                want = [_unscaled(v, head) for v in op.operands]
                same = _signature(op, want) == _signature(other, translated)
            else:
                same = _signature(op, op.operands) == _signature(other, translated)
            rw.check(same, f"the bodies differ at {other.op_name}")
            mapping.update(zip(other.results, op.results, strict=True))
    params: list[_Param] = []
    for value, names in groups.items():
        expr = lazy.stack([module.weights[name] for name in names])
        base = names[0].rsplit(".", 1)[0]
        name = base if module.weights.get(base) == expr else f"{names[0]}.stacked"
        params.append(_Param(value, declare(module, rw, name, expr)))
    return params


def _signature(op: Op, operands: list[Value]) -> object:
    return signature(op, operands)


def _unscaled(value: Value, head: _Region) -> Value:
    """The tokens that a region scales before its body, for a comparison of bodies."""
    scaled = value.op
    if isinstance(scaled, ops.Mul) and isinstance(_share_of(scaled.b), ops.ExpertWeight):
        return scaled.a
    return value


def _share_of(value: Value) -> Op | None:
    op = value.op
    while isinstance(op, ops.Reshape | ops.Cast):
        op = op.x.op
    return op


def _body(rw: Rewriter, head: _Region, params: Sequence[_Param]) -> Block:
    """The first expert's body over arguments."""
    types = [head.x.type, *(p.first.type for p in params)]
    names = ["tokens", *(f"param{i}" for i in range(len(params)))]
    block = Block(list(zip(names, types, strict=True)))
    mapping = {p.first: arg for p, arg in zip(params, block.args[1:], strict=True)}
    mapping[head.x] = block.args[0]
    for op in head.body:
        for value in op.operands:
            if head.apply == "input" and _unscaled(value, head) is head.x:
                mapping[value] = block.args[0]
        block.append(op.clone(mapping))
    block.append(ops.Yield([mapping[head.y]]))
    return block
