"""The models, one a file. Each maps a `Batch` and the `Lookup` of its ID embeddings to log-odds [S]."""

from torch import nn

from ctrkit.models.base import Base
from ctrkit.models.dicm import DICM
from ctrkit.models.din import DIN
from ctrkit.models.lr import LR
from ctrkit.models.plan import Plan

MODELS: dict[str, type[Base] | type[DICM] | type[DIN] | type[LR]] = {
    "dicm": DICM,
    "din": DIN,
    "base": Base,
    "lr": LR,
}


def make_model(plan: Plan) -> nn.Module:
    """Return a freshly initialised model for a plan. Seed torch first."""
    return MODELS[plan.train.model](plan)
