"""DIN's activation unit g(V_i, V_a), between a behaviour and the ad (DIN section 4.2)."""

import math
from collections.abc import Sequence

from torch import Tensor

from ctrkit.models.layers import PairMLP, segment_softmax, segment_sum

Pairs = tuple[Tensor, Tensor]
"""(sample, behaviour) of each pair, [P] each."""


class ActivationUnit(PairMLP):
    """Weights of a sample's behaviours (keys) by the ad (query), both of width `width`.

    `din-v1`: a network on [V_i; V_a; V_i − V_a] with 36 hidden units; weights as they come (the paper's text).
    `din-code`: on [q; k; q − k; q∘k], 80-40 with sigmoid; logits over √width, softmax (the authors' released code).
    """

    def __init__(self, width: int, form: str, activation: str) -> None:
        code = form == "din-code"
        hidden: Sequence[int] = (80, 40) if code else (36,)
        super().__init__(width, width, hidden, "sigmoid" if code else activation, "qkdp" if code else "qkd")
        self.normalised = code

    def weights_P(self, q_SD: Tensor, k_BD: Tensor, pairs: Pairs, dropout_rate: float = 0.0) -> Tensor:
        """Return [P], the weight of each pair.

        Weights that are not normalised are divided by 1 − `dropout_rate`, so that their sum over the pairs that dropout
        keeps has the expectation of the sum over all.
        """
        g_P: Tensor = self(q_SD, k_BD, *pairs)
        if self.normalised:
            return segment_softmax(g_P / math.sqrt(k_BD.shape[1]), pairs[0], len(q_SD))
        return g_P / (1.0 - dropout_rate) if dropout_rate else g_P


def weighted_sum(v_BD: Tensor, w_P: Tensor, pairs: Pairs, n_samples: int) -> Tensor:
    """Return [S, D], Σ w_i·V_i over each sample's pairs; zero without a history."""
    sample_P, behaviour_P = pairs
    return segment_sum(v_BD.index_select(0, behaviour_P) * w_P.unsqueeze(1), sample_P, n_samples)
