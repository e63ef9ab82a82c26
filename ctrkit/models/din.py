"""DIN: the user's vector depends on the ad, V_u = Σ g(V_i, V_a)·V_i (DIN section 4.2, eq. 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrkit.errors import UsageError
from ctrkit.models.activation_unit import ActivationUnit
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.layers import Discriminator, gather_rows
from ctrkit.models.plan import Plan


class DIN(nn.Module):
    """Base, with an activation unit on each (ad, behaviour) pair instead of plain sum pooling.

    The unit compares behaviour features with the ad's features of the same vocabulary (goods with goods, category
    with category); behaviour features without such a partner are weighted along but not compared.
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
        self.unit = ActivationUnit(plan.total_width(list(self.partner)), plan.train)
        width = plan.total_width([*plan.user, *plan.sample, *plan.behaviour])
        self.discriminator = Discriminator(width, plan.train.tower, plan.train.activation, plan.train.batch_norm)

    @property
    def id_unit(self) -> ActivationUnit:
        """The unit that compares ids."""
        return self.unit

    def weights_P(self, batch: Batch, look: Lookup) -> Tensor:
        """Return [P]: g(V_i, V_a) of every (sample, behaviour) pair, or of those that dropout keeps."""
        return self.unit.weights_P(*compared(self.plan, look), batch.id_pairs(), batch.dropout_rate)

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        parts = look.samples_S(self.plan.sample)
        parts.append(attended_ids(self.unit, self.plan, batch, look))
        out: Tensor = self.discriminator(torch.cat(parts, 1), look.users_G(self.plan.user))
        return out


def attended_ids(unit: ActivationUnit, plan: Plan, batch: Batch, look: Lookup) -> Tensor:
    """Return [S, sum of D]: the behaviours' ids, weighed by the unit."""
    partner, distinct = plan.partners(), batch.distinct
    # Where all of a behaviour is compared: one lookup, one gradient.
    whole = list(partner) == plan.behaviour
    if distinct is None:
        v_BD = look.behaviours_B(plan.behaviour)
        q_SD = torch.cat(look.samples_S(list(partner.values())), 1)
        k_BD = v_BD if whole else look.behaviours_B(list(partner))
        return unit.pool(q_SD, k_BD, v_BD, batch.id_pairs(), batch.dropout_rate)

    def rows(names: Sequence[str]) -> Tensor:
        return torch.cat(look.side_by_side(names, len(distinct.index[names[0]]), distinct.index), 1)

    v_KD, q_QD = rows(plan.behaviour), rows(list(partner.values()))
    k_KD = v_KD if whole else rows(list(partner))
    pairs = distinct.query_P, distinct.key_P
    return gather_rows(unit.pool(q_QD, k_KD, v_KD, pairs, times_B=distinct.times_K), distinct.query_S)


def compared(plan: Plan, look: Lookup) -> tuple[Tensor, Tensor]:
    """Return ([S, D], [B, D]): the ad's ids and the behaviours' of the same vocabularies, side by side."""
    partner = plan.partners()
    return torch.cat(look.samples_S(list(partner.values())), 1), look.behaviours_B(list(partner))
