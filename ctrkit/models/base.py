"""DIN's base model: embedding, sum pooling of the behaviours, fully connected layers (DIN section 4.1)."""

import torch
from torch import Tensor, nn

from ctrkit.models.batch import Batch, Lookup, sum_of_ids
from ctrkit.models.layers import Discriminator
from ctrkit.models.plan import Plan


class Base(nn.Module):
    """All ID features and the sum of the behaviours' embeddings, whatever the ad."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        width = plan.total_width([*plan.user, *plan.sample, *plan.behaviour])
        self.discriminator = Discriminator(width, plan.train.tower, plan.train.activation, plan.train.batch_norm)

    def forward(self, batch: Batch, look: Lookup) -> Tensor:
        parts = look.samples_S(self.plan.sample)
        if self.plan.behaviour:
            parts.append(sum_of_ids(batch, look.behaviours_B(self.plan.behaviour)))
        users = self.plan.user
        inputs = (torch.cat(parts, 1), look.users_G(users)) if parts else look.users_S(users)
        out: Tensor = self.discriminator(*inputs)
        return out
