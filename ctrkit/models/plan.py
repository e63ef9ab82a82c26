"""Which features a model looks at, from the recipe's `[features]` and `[train]`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ctrkit.batches import Schema
from ctrkit.errors import UsageError
from ctrkit.recipe import Train


@dataclass(frozen=True)
class Plan:
    """The inputs of one model. Names are the recipe's feature names, in its order."""

    train: Train
    schema: Schema
    user: list[str]
    sample: list[str]
    """Ad and scene features."""
    behaviour: list[str]
    ad_image: str
    """The ad's picture feature, for Adnet or SimTier; "" if the model does not look at it."""
    user_image: str
    """The behaviours' picture feature, for Usernet or SimTier."""
    picture_width: int
    """Numbers that an extractor gets of a picture, `has_picture` included."""

    @property
    def ids(self) -> list[str]:
        """All ID features of the model."""
        return [*self.user, *self.sample, *self.behaviour]

    @property
    def features(self) -> list[str]:
        """All features of the model, pictures included."""
        return self.ids + [n for n in (self.ad_image, self.user_image) if n]

    def width(self, name: str) -> int:
        """Return the embedding width of an ID feature; 1 for logistic regression."""
        return 1 if self.train.model == "lr" else self.schema.features[name].width

    def vocabularies(self) -> dict[int, list[str]]:
        """Return width → the vocabularies whose embeddings have it, in the order in which their table holds them."""
        out: dict[int, list[str]] = {}
        for name in self.ids:
            some = out.setdefault(self.width(name), [])
            if self.schema.features[name].vocab not in some:
                some.append(self.schema.features[name].vocab)
        return dict(sorted(out.items()))

    def total_width(self, names: Sequence[str]) -> int:
        """Return the summed widths of ID features."""
        return sum(self.width(n) for n in names)

    def partners(self) -> dict[str, str]:
        """Return behaviour feature → the ad feature of the same vocabulary, one-hot ones only."""
        features = self.schema.features
        ads = {features[n].vocab: n for n in self.sample if features[n].of == "ad" and not features[n].multi_hot}
        return {n: ads[features[n].vocab] for n in self.behaviour if features[n].vocab in ads}


def make_plan(train: Train, schema: Schema, picture_width: int) -> Plan:
    """Decide the inputs of the model that `[train]` describes."""
    features = schema.features
    dicm = train.model == "dicm"

    def wanted(name: str) -> bool:
        switch = features[name].switch
        if switch == "ad_id":
            return train.ad_id
        if switch == "user_ids":
            return bool(train.user_ids) if dicm else train.model != "lr"
        return True

    def picture(of: str, *wants: str) -> str:
        names = schema.names((of,), "image")
        if not (dicm and wants):
            return ""
        if not names:
            raise UsageError(f"[train] {wants[0]}, but [features] has no feature of = {of!r} with kind = 'image'")
        return names[0]

    user = [n for n in schema.names(("user",)) if wanted(n)]
    sample = [n for n in schema.names(("ad", "scene")) if wanted(n)]
    behaviour = [n for n in schema.names(("behaviour",)) if wanted(n) and train.model != "lr"]
    if not user and not sample:
        raise UsageError("the model has no ID feature of user, ad or scene; [features] must declare at least one")
    compares = [f'user_images = "{train.user_images}" compares pictures with the ad\'s'] * train.counts_tiers
    plan = Plan(
        train,
        schema,
        user,
        sample,
        behaviour,
        picture("ad", *(["ad_image is on"] * train.ad_image), *compares),
        picture("behaviour", *(["user_images is on"] * bool(train.user_images))),
        picture_width,
    )
    _check_dicm(plan)
    return plan


def _check_dicm(plan: Plan) -> None:
    """Refuse what DICM cannot be built from."""
    train = plan.train
    if train.model != "dicm":
        return
    if train.pools_pictures and train.pooling == "din" and not train.ad_image:
        raise UsageError(
            '[train] pooling = "din" weighs each picture of the user by the extracted picture of the ad, but ad_image '
            'is off. Set ad_image = true, or another pooling: "attentive", "sum" or "max".'
        )
    if train.user_ids and not plan.behaviour:
        raise UsageError("[train] user_ids is on, but [features] has no ID feature of = 'behaviour'")
    if train.user_ids == "din" and not plan.partners():
        raise UsageError(
            '[train] user_ids = "din" compares behaviours with the ad, but no behaviour feature shares its vocabulary '
            "with an ad feature that the model reads. Give one of each the same `vocab` in [features] (and leave "
            "ad_id on, if the ad's has that switch), or set user_ids = true, which sums them."
        )
