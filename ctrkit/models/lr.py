"""Logistic regression over the same ID features: a weight an id, summed (DICM Table I, basic ID-LR)."""

import torch
from torch import Tensor, nn

from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.plan import Plan


class LR(nn.Module):
    """log-odds = bias + sum of the ids' weights. Tables have width 1."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        parts = look.users_S(self.plan.user) + look.samples_S(self.plan.sample)
        return torch.cat(parts, 1).sum(1) + self.bias
