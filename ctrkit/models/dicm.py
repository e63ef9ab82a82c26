"""DICM: the ad's picture and the user's pictures beside the ID features (DICM sections III and IV)."""

import torch
from torch import Tensor, nn

from ctrkit.models.batch import Batch, Lookup, sum_of_ids
from ctrkit.models.layers import Discriminator, PairMLP, mlp, segment_max, segment_softmax, segment_sum
from ctrkit.models.plan import Plan


class DICM(nn.Module):
    """Basicnet, Adnet and Usernet into one discriminator, each by its switch (DICM Table I).

    Adnet: picture vector → extractor (256-64-12) → the ad's middle vector. Usernet: an extractor of the same form
    on each behaviour's picture, then the aggregator: attentive (a network over [user feature; ad middle vector;
    other middle vectors] → softmax → weighted sum), sum or max.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        train = plan.train
        d = train.extractor[-1]
        self.adnet = mlp([plan.picture_width, *train.extractor], "prelu") if plan.ad_image else None
        self.usernet: nn.Module | None = None
        if plan.user_image:
            shared = train.share_extractors and self.adnet is not None
            self.usernet = self.adnet if shared else mlp([plan.picture_width, *train.extractor], "prelu")
        context = plan.total_width([*plan.user, *plan.sample]) + d * bool(plan.ad_image)
        self.attention: PairMLP | None = None
        if plan.user_image and train.pooling == "attentive":
            self.attention = PairMLP(context, d, train.attention, train.activation)
        width = context + plan.total_width(plan.behaviour) + d * bool(plan.user_image)
        self.discriminator = Discriminator(width, train.tower, train.activation, train.batch_norm)

    def context_S(self, batch: Batch, look: Lookup) -> Tensor:
        """Return the ID features' and the ad picture's middle vectors side by side."""
        parts = look.users_S(self.plan.user) + look.samples_S(self.plan.sample)
        if self.adnet is not None:
            ad_ND = self.adnet(batch.picture_NW[self.plan.ad_image])
            parts.append(torch.nn.functional.embedding(batch.picture_index[self.plan.ad_image], ad_ND))
        return torch.cat(parts, 1)

    def user_pictures_BD(self, batch: Batch) -> Tensor:
        """Return the extracted vector of each behaviour's picture; each distinct picture is extracted once."""
        assert self.usernet is not None
        user_ND = self.usernet(batch.picture_NW[self.plan.user_image])
        return torch.nn.functional.embedding(batch.picture_index[self.plan.user_image], user_ND)

    def weights_P(self, batch: Batch, look: Lookup) -> Tensor:
        """Return [P]: the attentive weight of every (sample, behaviour picture) pair."""
        context_SD = self.context_S(batch, look)
        return self._attend_P(batch, context_SD, self.user_pictures_BD(batch))

    def _attend_P(self, batch: Batch, context_SD: Tensor, k_BD: Tensor) -> Tensor:
        assert self.attention is not None
        logits_P = self.attention(context_SD, k_BD, batch.sample_P, batch.behaviour_P)
        return segment_softmax(logits_P, batch.sample_P, batch.n_samples)

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        context_SD = self.context_S(batch, look)
        parts = [context_SD]
        if self.plan.behaviour:
            v_BD = look.behaviours_B(self.plan.behaviour)
            parts.append(sum_of_ids(batch, v_BD, self.plan.train.dropout_rate))
        if self.usernet is not None:
            k_BD = self.user_pictures_BD(batch)
            if self.attention is not None:
                w_P = self._attend_P(batch, context_SD, k_BD)
                v_PD = k_BD.index_select(0, batch.behaviour_P) * w_P.unsqueeze(1)
                parts.append(segment_sum(v_PD, batch.sample_P, batch.n_samples))
            else:
                pool = segment_sum if self.plan.train.pooling == "sum" else segment_max
                parts.append(pool(k_BD, batch.group_B, batch.n_groups).index_select(0, batch.group_S))
        out: Tensor = self.discriminator(torch.cat(parts, 1))
        return out
