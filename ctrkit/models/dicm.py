"""DICM: the ad's picture and the user's pictures beside the ID features (DICM sections III and IV)."""

import torch
from torch import Tensor, nn

from ctrkit.models.activation_unit import ActivationUnit
from ctrkit.models.batch import Batch, Lookup, sum_of_ids
from ctrkit.models.din import attended_ids
from ctrkit.models.layers import MLP, Discriminator, mlp, segment_max, segment_softmax, segment_sum
from ctrkit.models.pairs import PairMLP, attend
from ctrkit.models.plan import Plan
from ctrkit.models.simtier import similarities_P, tier_counts


class DICM(nn.Module):
    """Basicnet, Adnet and Usernet into one discriminator, each by its switch (DICM Table I).

    Adnet: picture vector → extractor (256-64-12) → the ad's middle vector. Usernet: an extractor of the same form
    on each behaviour's picture, then the aggregator: attentive (a network over [user feature; ad middle vector;
    other middle vectors] → softmax → weighted sum), sum, max, or DIN's activation unit between the two pictures.
    Beyond the paper: behaviour ids weighed by DIN's unit, and SimTier's counts of picture similarities.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        train = plan.train
        d = train.extractor[-1]
        shape = [plan.picture_width, *train.extractor]
        self.adnet = mlp(shape, train.extractor_activation) if train.ad_image else None
        self.usernet: MLP | None = None
        if train.pools_pictures:
            shared = train.share_extractors and self.adnet is not None
            self.usernet = self.adnet if shared else mlp(shape, train.extractor_activation)
        context = plan.total_width([*plan.user, *plan.sample]) + d * train.ad_image
        self.attention: PairMLP | None = None
        self.picture_unit: ActivationUnit | None = None
        if train.pools_pictures and train.pooling == "attentive":
            self.attention = PairMLP(context, d, train.attention, train.activation)
        elif train.pools_pictures and train.pooling == "din":
            self.picture_unit = ActivationUnit(d, train)
        self.id_unit: ActivationUnit | None = None
        if train.user_ids == "din":
            self.id_unit = ActivationUnit(plan.total_width(list(plan.partners())), train)
        width = context + plan.total_width(plan.behaviour) + d * train.pools_pictures
        width += train.tiers * train.counts_tiers
        self.discriminator = Discriminator(width, train.tower, train.activation, train.batch_norm)

    def pictures(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return (the ads' extracted picture vectors [S, D], the behaviours' [B, D]), where the model has them.

        Each distinct picture is extracted once: where pictures are spread over ranks, once over all of them, on the
        rank on which it lies.
        """
        ad_ND = user_ND = None
        ad_NW, user_NW = (batch.picture_NW.get(name) for name in (self.plan.ad_image, self.plan.user_image))
        count_ad, count_user = self._counts(batch)
        if self.adnet is not None and self.adnet is self.usernet and count_ad is not None and count_user is not None:
            # One extractor has one set of statistics: those of both sorts of pictures together.
            assert ad_NW is not None
            assert user_NW is not None
            both = self.adnet(torch.cat([ad_NW, user_NW]), torch.cat([count_ad, count_user]))
            ad_ND, user_ND = both[: len(ad_NW)], both[len(ad_NW) :]
        else:
            if self.adnet is not None:
                ad_ND = self.adnet(ad_NW, count_ad)
            if self.usernet is not None:
                user_ND = self.usernet(user_NW, count_user)
        names = self.plan.ad_image, self.plan.user_image
        made = {name: x for name, x in zip(names, (ad_ND, user_ND), strict=True) if x is not None}
        seen = {
            name: nn.functional.embedding(batch.picture_index[name], x)
            for name, x in batch.spread_pictures(made).items()
        }
        return seen.get(names[0]), seen.get(names[1])

    def _counts(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return how many samples show, and how many (sample, behaviour) pairs have, each distinct picture.

        Dice sees rows of samples, not of distinct pictures: a picture counts as often as samples see it.
        """
        if self.plan.train.extractor_activation != "dice" or not self.training:
            return None, None
        out: list[Tensor | None] = []
        ones_S = torch.ones_like(batch.click_S)
        of_group = segment_sum(ones_S, batch.group_S, batch.n_groups).index_select(0, batch.group_B)
        for name, weight in ((self.plan.ad_image, ones_S), (self.plan.user_image, of_group)):
            seen = batch.picture_index.get(name)
            if seen is None:
                out.append(None)
                continue
            named = batch.picture_row if name in batch.route else batch.picture_NW
            out.append(batch.collect(name, segment_sum(weight, seen, len(named[name]))))
        return out[0], out[1]

    def context_S(self, look: Lookup, ad_SD: Tensor | None) -> Tensor:
        """Return the ID features' and the ad picture's middle vectors side by side."""
        parts = look.users_S(self.plan.user) + look.samples_S(self.plan.sample)
        return torch.cat(parts if ad_SD is None else [*parts, ad_SD], 1)

    def weights_P(self, batch: Batch, look: Lookup) -> Tensor:
        """Return [P]: the aggregator's weight of every (sample, behaviour picture) pair, attentive or DIN's."""
        ad_SD, k_BD = self.pictures(batch)
        assert k_BD is not None
        pairs = (batch.sample_P, batch.behaviour_P)
        if self.picture_unit is not None:
            assert ad_SD is not None
            return self.picture_unit.weights_P(ad_SD, k_BD, pairs)
        assert self.attention is not None
        logits_P = self.attention(self.context_S(look, ad_SD), k_BD, *pairs)
        return segment_softmax(logits_P, batch.sample_P, batch.n_samples)

    def _pool_ids(self, batch: Batch, look: Lookup) -> Tensor:
        """Return [S, sum of D]: the behaviours' ids, summed or weighed by DIN's unit."""
        if self.id_unit is None:
            return sum_of_ids(batch, look.behaviours_B(self.plan.behaviour))
        return attended_ids(self.id_unit, self.plan, batch, look)

    def _pool_pictures(self, batch: Batch, context_SD: Tensor, ad_SD: Tensor | None, k_BD: Tensor) -> Tensor:
        """Return [S, D]: the aggregator of Usernet."""
        pairs = (batch.sample_P, batch.behaviour_P)
        if self.attention is not None:
            return attend(self.attention, context_SD, k_BD, k_BD, *pairs, softmax=True)
        if self.picture_unit is not None:
            assert ad_SD is not None
            return self.picture_unit.pool(ad_SD, k_BD, k_BD, pairs)
        pool = segment_sum if self.plan.train.pooling == "sum" else segment_max
        return pool(k_BD, batch.group_B, batch.n_groups).index_select(0, batch.group_S)

    def _tiers(self, batch: Batch) -> Tensor:
        """Return [S, tiers]: SimTier's counts."""
        width = self.plan.picture_width - self.plan.train.has_picture
        cosine_P, there_P = similarities_P(batch, self.plan.ad_image, self.plan.user_image, width)
        return tier_counts(cosine_P, there_P, batch.sample_P, batch.n_samples, self.plan.train.tiers)

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        ad_SD, user_BD = self.pictures(batch)
        context_SD = self.context_S(look, ad_SD)
        parts = [context_SD]
        if self.plan.behaviour:
            parts.append(self._pool_ids(batch, look))
        if user_BD is not None:
            parts.append(self._pool_pictures(batch, context_SD, ad_SD, user_BD))
        if self.plan.train.counts_tiers:
            parts.append(self._tiers(batch))
        out: Tensor = self.discriminator(torch.cat(parts, 1))
        return out
