"""All passes by name, and the order in which a target without wishes of its own runs them."""

from __future__ import annotations

from liquidc.passes.base import Pass
from liquidc.passes.choose_lowering import ChooseLowering
from liquidc.passes.compact_tokens import CompactTokens
from liquidc.passes.eliminate_common import EliminateCommon
from liquidc.passes.eliminate_dead import EliminateDead
from liquidc.passes.fix_depth import FixDepth
from liquidc.passes.fix_gates import FixGates
from liquidc.passes.fold_constants import FoldConstants
from liquidc.passes.fold_identity_experts import FoldIdentityExperts
from liquidc.passes.fold_router import FoldRouter
from liquidc.passes.fuse_linear import FuseLinear
from liquidc.passes.fuse_shared_experts import FuseSharedExperts
from liquidc.passes.group_experts import GroupExperts
from liquidc.passes.hoist_common import HoistCommon
from liquidc.passes.merge_experts import MergeExperts
from liquidc.passes.order_experts import OrderExperts
from liquidc.passes.prune_experts import PruneExperts
from liquidc.passes.quantize import Quantize
from liquidc.passes.quantize_cache import QuantizeCache
from liquidc.passes.specialize_decode import SpecializeDecode
from liquidc.passes.specialize_depth import SpecializeDepth
from liquidc.passes.stack_experts import StackExperts
from liquidc.passes.stack_results import StackResults

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        ChooseLowering,
        CompactTokens,
        EliminateCommon,
        EliminateDead,
        FixDepth,
        FixGates,
        FoldConstants,
        FoldIdentityExperts,
        FoldRouter,
        FuseLinear,
        FuseSharedExperts,
        GroupExperts,
        HoistCommon,
        MergeExperts,
        OrderExperts,
        PruneExperts,
        Quantize,
        QuantizeCache,
        SpecializeDecode,
        SpecializeDepth,
        StackExperts,
        StackResults,
    )
}

DEFAULT_PIPELINE = (
    "fold-constants",
    "eliminate-common",
    "hoist-common",
    "fold-identity-experts",
    "stack-experts",
    "group-experts",
    "fuse-shared-experts",
    "fold-router",
    "fuse-linear",
    "specialize-decode",
    "compact-tokens",
    "stack-results",
    "fold-constants",
    "eliminate-common",
    "eliminate-dead",
)

PROFILED = {"order-experts": "fuse-shared-experts", "choose-lowering": "compact-tokens"}
"""Passes that a profile adds to the default ones, each before the other."""


def is_lossy(name: str) -> bool:
    """Whether a pass changes results; False for a name that is no pass."""
    return name in PASSES and PASSES[name].contract == "lossy"
