"""Inputs of a step on a small model, for the tests on a pretended card and on a real one."""

from arms.cone import Contrast
from engine.sampler import Rollout

ROLLOUTS = [Rollout([5, 6, 7], list(range(8, 8 + n)), [-1.0] * n, True) for n in (4, 9, 2, 6)]
CONTRASTS = [Contrast([([5, 6, 7, 8], 3), ([5, 6, 9], 2)], ([5, 6, 4], 2)) for _ in range(2)]  # `int(index.max()) + 1` is 2 here
TWO_LAYERS = {"qwen3": {}, "qwen3_5_text": dict(layer_types=["linear_attention", "full_attention"])}
