"""SimTier: how many of the user's pictures are how similar to the ad's (arXiv 2407.19467, section 4)."""

import warnings

import torch
from torch import Tensor

from ctrkit.models.batch import Batch


@torch.no_grad()
def similarities_P(batch: Batch, ad_image: str, user_image: str, width: int) -> tuple[Tensor, Tensor]:
    """Return ([P] cosines, [P] bool) of the ad's picture vector and the behaviour's, as the extractors get them.

    Only the first `width` coordinates count: a last one may say whether there is a picture. The second tensor is
    false where one of the two is zero, which has no angle: a missing picture, or the mean of all.
    """
    ad_NW, user_NW = batch.picture_NW[ad_image][:, :width], batch.picture_NW[user_image][:, :width]
    ad_S, user_B = batch.picture_index[ad_image], batch.picture_index[user_image]
    norm_P = torch.linalg.vector_norm(ad_NW, dim=1)[ad_S[batch.sample_P]]
    norm_P = norm_P * torch.linalg.vector_norm(user_NW, dim=1)[user_B[batch.behaviour_P]]
    if not len(norm_P):
        return norm_P, norm_P > 0
    there_P = norm_P > 0
    if torch.compiler.is_compiling():  # sparse layouts cannot be traced
        dot_P = (ad_NW[ad_S[batch.sample_P]] * user_NW[user_B[batch.behaviour_P]]).sum(1)
        return dot_P / torch.where(there_P, norm_P, 1.0), there_P
    # The product [samples, behaviours] only where the sample has the behaviour; its rows are the samples.
    pairs_S = torch.bincount(batch.sample_P, minlength=batch.n_samples)
    end_S = torch.cat([pairs_S.new_zeros(1), pairs_S.cumsum(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(
            end_S,
            batch.behaviour_P,
            torch.zeros_like(norm_P),
            (batch.n_samples, len(user_B)),
            check_invariants=False,
        )
        ad_SW, user_BW = ad_NW.index_select(0, ad_S), user_NW.index_select(0, user_B)
        dot_P = torch.sparse.sampled_addmm(wanted, ad_SW, user_BW.t(), beta=0.0).values()
    return dot_P / torch.where(there_P, norm_P, 1.0), there_P


@torch.no_grad()
def tier_counts(cosine_P: Tensor, there_P: Tensor, sample_P: Tensor, n_samples: int, tiers: int) -> Tensor:
    """Return [S, tiers]: how many of a sample's cosines lie in each of equal tiers of [-1, 1].

    Tier i holds −1 + 2i/tiers ≤ cosine < −1 + 2(i + 1)/tiers, the last one 1 as well. Pairs that are not there count
    in none; a sample without pairs has zeros.
    """
    tier_P = ((cosine_P + 1.0) * (tiers / 2)).floor().long().clamp_(0, tiers - 1)
    counts = cosine_P.new_zeros(n_samples * tiers)
    return counts.index_add_(0, sample_P * tiers + tier_P, there_P.to(cosine_P.dtype)).view(n_samples, tiers)
