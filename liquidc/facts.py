"""What a manifest says about a module, read off the IR: gates, experts, cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from liquidc.errors import InternalError
from liquidc.ir import Function, Module, ops
from liquidc.ir.experts import (
    Holder,
    identity_experts,
    layers_of_experts,
    places_of_experts,
    routers_by_layer,
)
from liquidc.ir.regions import regions_of
from liquidc.ir.types import TensorType
from liquidc.ir.weights import sizes
from liquidc.manifest import (
    CacheInfo,
    EntryPoint,
    ExpertInfo,
    GateInfo,
    ModelInfo,
    RegionInfo,
    TensorSpec,
)


def entry_points(module: Module) -> dict[str, EntryPoint]:
    """Inputs and outputs of every function."""
    return {
        name: EntryPoint(
            tuple(_spec(arg.name, arg.type) for arg in function.args),
            tuple(
                _spec(result, value.type)
                for result, value in zip(function.result_names, function.returned, strict=True)
            ),
        )
        for name, function in module.functions.items()
    }


def model_info(module: Module, type: str, sha256: str) -> ModelInfo:
    """The model, by its main function."""
    main = main_function(module)
    logits = dict(zip(main.result_names, main.returned, strict=True))["logits"]
    context = module.attributes.get("max_positions")
    return ModelInfo(
        sha256=sha256,
        type=type,
        layers=cast(int, module.attributes.get("layers", 0)),
        vocabulary=cast(int, logits.shape[-1]),
        context=context if isinstance(context, int) else None,
        gates=_gates(main),
        experts=_experts(main),
    )


def cache_info(module: Module) -> CacheInfo | None:
    """The cache; None in a module without one."""
    main = main_function(module)
    keys = [arg for arg in main.args if arg.name.startswith("past.") and arg.name.endswith(".key")]
    if not keys:
        return None
    policy = str(module.attributes.get("kv_policy", "own"))
    lengths = next(arg for arg in main.args if arg.name == "kv_len")
    layers = sizes(lengths.shape[:1])[0]
    present = {int(key.name.split(".")[1]) for key in keys}
    absent = tuple(layer for layer in range(layers) if layer not in present)
    return CacheInfo(layers, str(keys[0].dtype), keys[0].shape, policy, absent)


def main_function(module: Module) -> Function:
    """`@prefill`, or the only function that there is.

    Raises:
        InternalError: there is no function.
    """
    if not module.functions:
        raise InternalError("the module has no function")
    return module.functions.get("prefill") or next(iter(module.functions.values()))


def _spec(name: str, type: TensorType) -> TensorSpec:
    return TensorSpec(name, str(type.dtype), type.shape)


def _gates(main: Function) -> tuple[GateInfo, ...]:
    regions: dict[int, list[RegionInfo]] = {}
    for region in regions_of(main):
        if not region.tried:
            gate, number = region.key
            info = RegionInfo(
                number,
                region.lowering,
                region.masks,
                region.within,
                region.without,
                region.shown,
            )
            regions.setdefault(gate, []).append(info)
    found: dict[int, GateInfo] = {}
    for op in main.body.walk():
        if isinstance(op, ops.DepthGate | ops.FixedGate):
            fixed = 0 if isinstance(op, ops.DepthGate) else 1 if op.run else -1
            opened = tuple(regions.get(op.gate, ()))
            found[op.gate] = GateInfo(
                op.layer, op.threshold, op.compare, op.reserved, fixed, opened
            )
    return tuple(found[index] for index in sorted(found))


def _experts(main: Function) -> tuple[ExpertInfo, ...]:
    """Experts by layer: the router behind each row of the result `experts`."""
    layers = layers_of_experts(main)
    holders = {layer: op for op, layer in layers.items() if isinstance(op, Holder)}
    stored, infos = places_of_experts(main), list[ExpertInfo]()
    for layer, (route, *_) in routers_by_layer(main).items():
        count = cast(int, route.logits.shape[-1])
        shared = identity = 0
        if (holder := holders.get(layer)) is not None:
            shared = sizes(holder.index.shape[-1:])[0] - route.k
            identity = identity_experts(holder)
        places = stored.get(layer, ())
        infos.append(ExpertInfo(layer, count, route.k, shared, places, identity))
    return tuple(infos)


def total_bytes(types: Iterable[TensorType]) -> int:
    """Bytes of tensors of these types."""
    result = 0
    for type in types:
        size = type.dtype.bytes
        for dim in sizes(type.shape):
            size *= dim
        result += size
    return result
