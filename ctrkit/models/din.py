"""DIN: the user's vector depends on the ad, V_u = Σ g(V_i, V_a)·V_i (DIN section 4.2, eq. 2)."""

import math

import torch
from torch import Tensor, nn

from ctrkit.errors import UsageError
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.layers import Discriminator, PairMLP, segment_softmax, segment_sum
from ctrkit.models.plan import Plan


class DIN(nn.Module):
    """Base, with an activation unit on each (ad, behaviour) pair instead of plain sum pooling.

    The unit compares behaviour features with the ad's features of the same vocabulary (goods with goods, category
    with category); behaviour features without such a partner are weighted along but not compared.
    `din-v1`: g over [V_i; V_a; V_i − V_a], 36 hidden units, weights as they come (the paper's text).
    `din-code`: [q; k; q − k; q∘k], 80-40 with sigmoid, logits over √d, softmax (the authors' released code).
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.partner = plan.partners()
        if not self.partner:
            raise UsageError(
                "model 'din' compares behaviours with the ad, but no behaviour feature shares its vocabulary with an "
                "ad feature. Give one of each the same `vocab` in [features]."
            )
        d = plan.total_width(list(self.partner))
        self.code = plan.train.din == "din-code"
        if self.code:
            self.unit = PairMLP(d, d, (80, 40), "sigmoid", "qkdp")
        else:
            self.unit = PairMLP(d, d, (36,), plan.train.activation, "qkd")
        width = plan.total_width([*plan.user, *plan.sample, *plan.behaviour])
        self.discriminator = Discriminator(width, plan.train.tower, plan.train.activation, plan.train.batch_norm)

    def weights_P(self, batch: Batch, look: Lookup) -> Tensor:
        """Return [P]: g(V_i, V_a) of every (sample, behaviour) pair, or of those that dropout keeps."""
        sample_P, behaviour_P = batch.id_pairs()
        q_SD = torch.cat(look.samples_S(list(self.partner.values())), 1)
        k_BD = look.behaviours_B(list(self.partner))
        g_P: Tensor = self.unit(q_SD, k_BD, sample_P, behaviour_P)
        if self.code:
            return segment_softmax(g_P / math.sqrt(k_BD.shape[1]), sample_P, batch.n_samples)
        # Weights that are not normalised are scaled as dropout does: their sum keeps its expectation.
        return g_P if batch.kept_P is None else g_P / (1.0 - self.plan.train.dropout_rate)

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        parts = look.users_S(self.plan.user) + look.samples_S(self.plan.sample)
        w_P = self.weights_P(batch, look)
        v_BD = look.behaviours_B(self.plan.behaviour)
        sample_P, behaviour_P = batch.id_pairs()
        v_PD = v_BD.index_select(0, behaviour_P) * w_P.unsqueeze(1)
        parts.append(segment_sum(v_PD, sample_P, batch.n_samples))
        out: Tensor = self.discriminator(torch.cat(parts, 1))
        return out
