"""Why each gate of an engine is computed as it is, from what the passes wrote into its manifest."""

from __future__ import annotations

from typing import Any

from liquidc.manifest import GateInfo, Manifest, reading_facts


@reading_facts()
def explain_lowerings(manifest: Manifest) -> list[dict[str, Any]]:
    """One entry for each gate.

    Returns:
        `gate`, `layer`, `lowering` (run, skip, branch, compact or mask), `reason`; if it was chosen
        by cost, also `run_rate`, `calls` and `us`, the expected microseconds of those calls by
        lowering.
    """
    told = {info.name: info.facts or {} for info in manifest.passes}
    chosen = {
        entry["gate"]: entry
        for entry in told.get("choose-lowering", {}).get("gates", [])
        if entry["function"] == "prefill"
    }
    found: list[dict[str, Any]] = []
    for number, gate in enumerate(manifest.model.gates):
        entry = chosen.get(number)
        reason = _reason(number, gate, told) if entry is None else entry["reason"]
        lowering = {1: "run", -1: "skip"}.get(gate.fixed, gate.lowering)
        line = {"gate": number, "layer": gate.layer, "lowering": lowering, "reason": reason}
        if entry is not None:
            line |= {key: entry[key] for key in ("run_rate", "calls", "us")}
        found.append(line)
    return found


def _reason(number: int, gate: GateInfo, told: dict[str, dict[str, Any]]) -> str:
    if gate.fixed:
        return "decided at compile time by fix-gates, within the budget"
    if "fix-depth" in told:
        return "the target can't branch: paths are straight-line code, the rest is masked"
    if number in told.get("specialize-depth", {}).get("always", []):
        return "specialize-depth: nearly all tokens of the profile run it"
    if gate.lowering == "compact":
        return "compact-tokens, as always without a profile"
    return f"{gate.lowering}: compact-tokens did not run, or did not apply"
