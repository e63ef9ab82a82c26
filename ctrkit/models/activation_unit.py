"""DIN's activation unit g(V_i, V_a), between a behaviour and the ad (DIN section 4.2)."""

import math

from torch import Tensor

from ctrkit.models.layers import segment_softmax
from ctrkit.models.pairs import PairMLP, attend
from ctrkit.recipe import Train

SamplesAndBehaviours = tuple[Tensor, Tensor]
"""Of each pair, [P] each; samples rising."""


class ActivationUnit(PairMLP):
    """Weights of a sample's behaviours (keys) by the ad (query), both of width `width`, in the form `[train] din`.

    `din-v1`: a network on [V_i; V_a; V_i − V_a] with 36 hidden units; weights as they come (the paper's text).
    `din-code`: on [q; k; q − k; q∘k], 80-40 with sigmoid; logits over √width, softmax (the authors' released code).
    """

    def __init__(self, width: int, train: Train) -> None:
        if train.din == "din-code":
            super().__init__(width, width, (80, 40), train.din_activation, "qkdp")
        else:
            super().__init__(width, width, (36,), train.activation, "qkd")
        self.width, self.softmax = width, train.din == "din-code"

    def scale(self, dropout_rate: float) -> float:
        """Return what the network's output is multiplied by.

        Weights that are not normalised are divided by 1 − rate, so that their sum over the pairs that dropout keeps has
        the expectation of the sum over all.
        """
        return 1.0 / math.sqrt(self.width) if self.softmax else 1.0 / (1.0 - dropout_rate)

    def weights_P(self, q_SD: Tensor, k_BD: Tensor, pairs: SamplesAndBehaviours, dropout_rate: float = 0.0) -> Tensor:
        """Return [P], the weight of each pair."""
        g_P: Tensor = self(q_SD, k_BD, *pairs) * self.scale(dropout_rate)
        return segment_softmax(g_P, pairs[0], len(q_SD)) if self.softmax else g_P

    def pool(
        self,
        q_SD: Tensor,
        k_BD: Tensor,
        v_BE: Tensor,
        pairs: SamplesAndBehaviours,
        dropout_rate: float = 0.0,
        times_B: Tensor | None = None,
    ) -> Tensor:
        """Return [S, E], the weighted sum of each sample's behaviours; zero without a history. times_B as in
        `attend`."""
        scale = self.scale(dropout_rate)
        return attend(self, q_SD, k_BD, v_BE, *pairs, softmax=self.softmax, scale=scale, times_B=times_B)
