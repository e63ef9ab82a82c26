"""DIN's activation unit g(V_i, V_a), between a behaviour and the ad (DIN section 4.2)."""

import math
from collections.abc import Sequence

from torch import Tensor

from ctrkit.models.layers import segment_softmax
from ctrkit.models.pairs import PairMLP, attend

Pairs = tuple[Tensor, Tensor]
"""(sample, behaviour) of each pair, [P] each."""


class ActivationUnit(PairMLP):
    """Weights of a sample's behaviours (keys) by the ad (query), both of width `width`.

    `din-v1`: a network on [V_i; V_a; V_i − V_a] with 36 hidden units; weights as they come (the paper's text).
    `din-code`: on [q; k; q − k; q∘k], 80-40 with sigmoid; logits over √width, softmax (the authors' released code).
    `activation` is between the layers of din-v1, `code_activation` between those of din-code.
    """

    def __init__(self, width: int, form: str, activation: str, code_activation: str = "sigmoid") -> None:
        code = form == "din-code"
        hidden: Sequence[int] = (80, 40) if code else (36,)
        super().__init__(width, width, hidden, code_activation if code else activation, "qkdp" if code else "qkd")
        self.normalised = code

    def weights_P(self, q_SD: Tensor, k_BD: Tensor, pairs: Pairs, dropout_rate: float = 0.0) -> Tensor:
        """Return [P], the weight of each pair.

        Weights that are not normalised are divided by 1 − `dropout_rate`, so that their sum over the pairs that dropout
        keeps has the expectation of the sum over all.
        """
        g_P: Tensor = self(q_SD, k_BD, *pairs)
        g_P = g_P * self._scale(k_BD, dropout_rate)
        return segment_softmax(g_P, pairs[0], len(q_SD)) if self.normalised else g_P

    def pool(self, q_SD: Tensor, k_BD: Tensor, v_BE: Tensor, pairs: Pairs, dropout_rate: float = 0.0) -> Tensor:
        """Return [S, E], Σ w_i·v_i over each sample's pairs (DIN eq. 2); zero without a history."""
        scale = self._scale(k_BD, dropout_rate)
        return attend(self, q_SD, k_BD, v_BE, *pairs, softmax=self.normalised, scale=scale)

    def _scale(self, k_BD: Tensor, dropout_rate: float) -> float:
        return 1.0 / math.sqrt(k_BD.shape[1]) if self.normalised else 1.0 / (1.0 - dropout_rate)
