"""Experts and the router that chooses them: what passes find, check, and take together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from liquidc.errors import InputError
from liquidc.ir import Block, Function, Module, Op, Value, ops
from liquidc.ir.experts import Holder, experts_held
from liquidc.ir.rewriter import Refusal, Rewriter, Statistics
from liquidc.ir.weight_maths import Take
from liquidc.passes.base import Pass
from liquidc.passes.fold_constants import declare
from liquidc.profile import ExpertProfile, Profile

Readers = Mapping[ops.Route, list[Op]]
_NUMBERED = (ops.GroupedExperts, ops.MapExperts, ops.ExpertMask, ops.ExpertWeight)
"""Ops for which an expert's number means its weights."""
RATIO = 0.25
"""Share of the experts that goes unless `keep` or `ratio` says otherwise."""
_MOVES = (ops.Reshape, ops.GatherRows, ops.Cast)
"""Ops that leave every token's numbers as they are."""


def check_options(keep: int, ratio: float) -> None:
    """Refuse what makes no sense.

    Raises:
        ValueError: an option is out of its range, or the other one makes it mean nothing.
    """
    if keep < 0 or not 0 < ratio < 1:
        raise ValueError("keep is a number of experts, or 0; ratio lies between 0 and 1")
    if keep and ratio != RATIO:
        raise ValueError("keep and ratio both say how many experts stay: give one of them")


def share_left(count: int, ratio: float) -> int:
    """How many of `count` experts stay when `ratio` of them goes, rounded up."""
    return count - int(count * ratio + 1e-9)


def starved(profile: ExpertProfile, least: int) -> list[int]:
    """The experts with fewer than `least` tokens."""
    return [expert for expert, tokens in enumerate(profile.load) if tokens < least]


@dataclass(frozen=True)
class Routed:
    """The experts of one layer in one function.

    Attributes:
        linear: makes the logits.
        logits: what stands between the linear and the router, in order.
        route: the router.
        chosen: what stands between the router and the experts.
        holder: the experts.
    """

    linear: ops.Linear
    logits: tuple[Op, ...]
    route: ops.Route
    chosen: tuple[Op, ...]
    holder: Holder

    @property
    def block(self) -> Block:
        """Where the experts stand."""
        return cast(Block, self.holder.parent)

    @property
    def router(self) -> str:
        """The name of the router's weight."""
        return weight_name(self.linear.weight)

    @property
    def params(self) -> list[Value]:
        """The experts' weights, experts in front."""
        holder = self.holder
        return holder.params if isinstance(holder, ops.MapExperts) else holder.operands[3:]

    @property
    def ops(self) -> tuple[Op, ...]:
        """All of it; every op after those whose results it reads."""
        return (self.linear, *self.logits, self.route, *self.chosen, self.holder)


def routers(function: Function) -> list[list[ops.Route]]:
    """The routers of a function by layer, in order; those that read one weight share a layer."""
    layers: dict[object, list[ops.Route]] = {}
    for op in function.body.walk():
        if isinstance(op, ops.Route):
            layers.setdefault(_weight_of(op), []).append(op)
    return list(layers.values())


Change = Callable[[ExpertProfile, list["Routed"], Rewriter], dict[str, Any]]
"""Changes the experts of one layer in all functions; gives what its user should know.

Refuses, through the rewriter, before anything is changed.
"""


def change_layers(
    step: Pass, module: Module, statistics: Statistics, profile: Profile, change: Change
) -> None:
    """Apply `change` to every layer whose experts are found; the others stay, with the reason.

    Raises:
        InputError: the profile is of other layers.
    """
    layers: list[list[ops.Route]] = [[] for _ in profile.experts]
    for function in module.functions.values():
        found = routers(function)
        if len(found) != len(layers):
            raise InputError(
                f"the pass {step.name}: the profile has {len(layers)} layers with experts, "
                f"@{function.name} has {len(found)}"
            )
        for layer, routes in zip(layers, found, strict=True):
            layer += routes
    users, changed, said = readers(module), renumbered(module), list[dict[str, Any]]()
    for experts, routes in zip(profile.experts, layers, strict=True):
        rw = Rewriter(Block(), [])
        try:
            for route in routes:
                _check_profiled(route, experts, rw)
                rw.check(route not in changed, "its experts have other numbers already")
            parts = [routed(route, users, rw) for route in routes]
            for part in parts:
                _check_weights(part, rw)
            said.append(change(experts, parts, rw))
            statistics.fired[step.name] += 1
        except Refusal as refusal:
            statistics.refuse(step.name, routes[0], refusal)
            said.append({"layer": experts.layer, "reason": refusal.reason})
    statistics.facts[step.name] = {"layers": said}


def _check_profiled(route: ops.Route, experts: ExpertProfile, rw: Rewriter) -> None:
    count, k = route.logits.shape[-1], route.k
    same = (count, k) == (len(experts.load), experts.per_token)
    rw.check(same, f"the profile is of {len(experts.load)} experts, not {count}")


def _check_weights(one: Routed, rw: Rewriter) -> None:
    """Refuse identity experts, which have no weights to order, to leave out or to merge."""
    held, count = experts_held(one.holder), one.route.logits.shape[-1]
    rw.check(held == count, f"its router chooses among {count} experts, {held} have weights")


def readers(module: Module) -> Readers:
    """By router, the ops that take its choice for numbers of weights, dead ones left out."""
    found: defaultdict[ops.Route, list[Op]] = defaultdict(list)
    for op in module.walk():
        if isinstance(op, _NUMBERED) and (route := _origin(op.index)[0]) is not None:
            if _is_used(op):
                found[route].append(op)
    return found


def _is_used(op: Op) -> bool:
    """Whether a function's result or a conditional depends on an op."""
    pending, seen = [op], {id(op)}
    while pending:
        op = pending.pop()
        if op.terminator or isinstance(op, ops.If):
            return True
        users = [user for value in op.results for user in value.uses if id(user) not in seen]
        seen |= {id(user) for user in users}
        pending += users
    return False


def routed(route: ops.Route, users: Readers, rw: Rewriter) -> Routed:
    """The experts behind a router, and its linear.

    Raises:
        Refusal: they are not understood.
    """
    held = users.get(route, [])
    holder = held[0] if len(held) == 1 else None
    if not isinstance(holder, Holder):
        rw.refuse("its experts are not in one op: run group-experts before")
    numbers = _origin(holder.index)[1]
    weights_from, weights = _origin(holder.weight)
    rw.check(weights_from is route, "the experts' weights are not the router's")
    linear, logits = logits_from(route)
    linear = rw.need(linear, ops.Linear, "the router's logits come from no linear")
    alone = all(len(op.result.uses) == 1 for op in (linear, *logits))
    rw.check(alone, "the router's logits are used elsewhere")
    found = Routed(linear, logits, route, (*numbers, *weights), holder)
    needed = [linear.weight, linear.bias, route.selection_bias, *found.params]
    known = all(value is None or isinstance(value.op, ops.Weight) for value in needed)
    rw.check(known, "a parameter of the router or of the experts is computed")
    return found


def logits_from(route: ops.Route) -> tuple[Op | None, tuple[Op, ...]]:
    """The op that makes a router's logits, and what stands between, in order."""
    between: list[Op] = []
    op = route.logits.op
    while op is not None:
        if isinstance(op, ops.Add) and (added := _weight_operand(op)) is not None:
            between.append(op)
            op = (op.b if added is op.a else op.a).op
        elif isinstance(op, _MOVES) and op.x.shape[-1:] == op.y.shape[-1:]:
            between.append(op)
            op = op.x.op
        else:
            break
    return op, tuple(reversed(between))


def _weight_operand(op: ops.Add) -> Value | None:
    """A bias [E] that an op adds."""
    shape = op.y.shape[-1:]
    return next((v for v in op.operands if isinstance(v.op, ops.Weight) and v.shape == shape), None)


def take_experts(module: Module, found: Routed, entries: tuple[int, ...], suffix: str) -> None:
    """Keep these experts of a layer, in this order: their weights, their rows of the router."""
    for op in found.ops:
        op.set_operands([_taken(module, op, value, entries, suffix) for value in op.operands])
    for op in (found.linear, *found.logits):
        if isinstance(op, ops.Reshape):
            op.set_attribute("shape", (*op.shape[:-1], len(entries)))
        (op.result.type,) = op.infer()


def _taken(module: Module, user: Op, value: Value, entries: tuple[int, ...], suffix: str) -> Value:
    """Those entries of a weight; other values as they are."""
    weight, block = value.op, user.parent
    if not isinstance(weight, ops.Weight) or block is None:
        return value
    rw = Rewriter(block, [])
    expr = Take(module.weights[weight.weight], 0, entries)
    taken = declare(module, rw, f"{weight.weight}.{suffix}", expr)
    block.insert_before(user, rw.emitted[0])
    return taken


def weight_name(value: Value) -> str:
    """The name of the weight that a value is; empty if it is none."""
    return value.op.weight if isinstance(value.op, ops.Weight) else ""


def _weight_of(route: ops.Route) -> object:
    """What tells the routers of a function apart."""
    linear = logits_from(route)[0]
    return (weight_name(linear.weight) if isinstance(linear, ops.Linear) else "") or route


def renumbered(module: Module) -> list[ops.Route]:
    """The routers whose numbers are changed somewhere behind them."""
    found = (_origin(op.index)[0] for op in module.walk() if isinstance(op, ops.Renumber))
    return [route for route in found if route is not None]


def _origin(value: Value) -> tuple[ops.Route | None, tuple[Op, ...]]:
    """The router that an index or a weight comes from, and what stands between, in order."""
    between: list[Op] = []
    op = value.op
    while isinstance(op, (*_MOVES, ops.Where, ops.Renumber)):
        between.append(op)
        op = op.operands[1 if isinstance(op, ops.Where) else 0].op
    return (op if isinstance(op, ops.Route) else None), tuple(reversed(between))
