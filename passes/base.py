"""What a pass is: a name, a contract, options, the stage facts that it needs and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from liquidc.errors import InputError, InternalError
from liquidc.ir import Module, ops
from liquidc.ir.rewriter import Statistics
from liquidc.ir.weights import WeightSource
from liquidc.machine import MachineTable
from liquidc.profile import Profile

if TYPE_CHECKING:
    from liquidc.passes.stream import Calibration


def _no_expert_regions(module: Module) -> bool:
    return not any(isinstance(op, ops.If) and op.role == "expert" for op in module.walk())


Need = Literal["", "gates", "experts", "cache"]
"""What a model must have for a pass to have something to do."""

FACTS: dict[str, Callable[[Module], bool]] = {"no-expert-regions": _no_expert_regions}
"""Facts about a module that a pass can require or ensure."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides the module.

    Args:
        profile: what was measured of the model.
        source: where the weights' tensors are.
        machine: what was measured of the machine that will run the engine; None for the table
            that comes with liquidc.
        calibration: text to calibrate on.
        recipe: schemes by the name of the weight, for `quantize{scheme=mixed}`.
    """

    profile: Profile | None = None
    source: WeightSource | None = None
    machine: MachineTable | None = None
    calibration: Calibration | None = None
    recipe: Mapping[str, str] | None = None

    def need_profile(self, name: str) -> Profile:
        """The profile.

        Raises:
            InputError: there is none.
        """
        if self.profile is None:
            raise InputError(f"the pass {name} needs a profile: make one with liquidc profile")
        return self.profile

    def need_source(self, name: str) -> WeightSource:
        """Where weights are read.

        Raises:
            InputError: there is no model, only IR.
        """
        if self.source is None:
            raise InputError(f"the pass {name} needs the model's weights: use it in a compile")
        return self.source


@dataclass(frozen=True)
class Pass:
    """A transformation of a module; the fields of a subclass are its command-line options.

    `contract` says how results may change: not by a bit (`bitwise`), or by floating-point sums in
    another order (`reassociates`); decisions and integers never change. A `lossy` pass changes
    results, is never run unasked, and is measured. `needs` says what a model must have for the pass
    to have something to do: to ask for it otherwise is refused.
    """

    name: ClassVar[str]
    contract: ClassVar[Literal["bitwise", "reassociates", "lossy"]]
    needs: ClassVar[Need] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(
        self, module: Module, statistics: Statistics, context: PassContext | None = None
    ) -> None:
        """Transform `module` in place.

        Raises:
            InputError: a fact that the pass requires does not hold.
            InternalError: the pass did not keep its word.
        """
        for fact in self.requires:
            if not FACTS[fact](module):
                raise InputError(f"the pass {self.name} needs {fact}: run another pass before it")
        self.apply(module, statistics, context or PassContext())
        for fact in self.ensures:
            if not FACTS[fact](module):
                raise InternalError(f"the pass {self.name} did not establish {fact}")

    def apply(self, module: Module, statistics: Statistics, context: PassContext) -> None:
        """What the pass does."""
        raise NotImplementedError
