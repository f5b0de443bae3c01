"""What sets an arm apart from plain GRPO, as data: the loop of grpo.py reads these fields and nothing else of an arm.

A new arm is a line here and its name in `harness.config.Arm`; what it computes, if anything, is a short file in this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """One arm. The defaults are `vanilla`: nothing is removed, and cos_align is still logged."""

    loophole: bool = True  # whether its prompts tell of the loophole
    # What the step is projected on: the denoised direction, the raw one, a Gaussian one, or the cone's rows; None: nothing.
    direction: Literal["svd", "raw", "random", "rows"] | None = None
    gate: bool = False  # whether the run stops where steering along the direction raises nothing
    renorm: bool = True  # whether the projected step gets its magnitude back
    discount: bool = False  # whether rewards are discounted by how hacky a response looks (arms/rebound.py)
    request: bool = False  # whether it samples under a request not to game the evaluation (arms/recontextualised.py)
    ablate: Literal["svd", "random"] | None = None  # the direction that its training lacks (arms/caft.py)
    # Which responses are not paid for being right: those that the loophole's sentence alone explains, or those with a known hack.
    screen: Literal["counterfactual", "known"] | None = None  # (arms/counterfactual.py)


ARMS = {
    "vanilla": Arm(),
    "projected": Arm(direction="svd"),
    "projected_gated": Arm(direction="svd", gate=True),  # along the direction of harness.config.DIRECTION_OF
    "cone": Arm(direction="rows"),
    "counterfactual": Arm(screen="counterfactual"),
    "screen_known": Arm(screen="known"),
    "no_renorm": Arm(direction="svd", renorm=False),
    "no_svd": Arm(direction="raw"),
    "random": Arm(direction="random"),
    "rebound": Arm(discount=True),
    "recontextualised": Arm(request=True),
    "caft": Arm(ablate="svd"),
    "caft_random": Arm(ablate="random"),
    "no_loophole": Arm(loophole=False),
}
