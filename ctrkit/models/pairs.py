"""Networks on (sample, behaviour) pairs, and the behaviours' weighted sum that they decide.

Shape letters as in `ctrkit.batches`; H is a hidden width, E the width of what is summed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrkit.models.compiled_layers import loops
from ctrkit.models.layers import Dice, PReLU, activation, linear, mlp, segment_softmax, segment_sum
from ctrkit.models.pair_blocks import Attend, Pairs
from ctrkit.models.pair_net import attend_by_net, net_loops
from ctrkit.models.pair_threads import CompiledPairs


class PairMLP(nn.Module):
    """A network on a pair (query of a sample, key of a behaviour) → [P], without building the concatenation.

    The input is [q; k], or [q; k; q − k; q∘k] restricted to the named `parts`. The first layer is split:
    W[q; k; q−k; q∘k] = (W_q + W_d)·q + (W_k − W_d)·k + W_p·(q∘k), so q is projected once a sample and k once a
    behaviour. Exact.
    """

    def __init__(self, q: int, k: int, hidden: Sequence[int], act: str, parts: str = "qk") -> None:
        super().__init__()
        self.parts = parts
        if parts != "qk" and q != k:
            raise ValueError(f"q − k and q∘k need equal widths, not {q} and {k}")
        width = {"q": q, "k": k, "d": q, "p": q}
        first = nn.Linear(sum(width[p] for p in parts), hidden[0])
        weight = dict(zip(parts, torch.split(first.weight.detach(), [width[p] for p in parts], dim=1), strict=True))
        self.weight = nn.ParameterDict({p: nn.Parameter(w.clone()) for p, w in weight.items()})
        self.bias = nn.Parameter(first.bias.detach().clone())
        self.act = activation(act, hidden[0])
        self.rest = mlp([*hidden, 1], act)

    def first(self) -> tuple[Tensor, Tensor]:
        """Return ([H, D], [H, D]): the first layer's matrices of q and of k."""
        w_q, w_k = self.weight["q"], self.weight["k"]
        return (w_q + self.weight["d"], w_k - self.weight["d"]) if "d" in self.parts else (w_q, w_k)

    def project(self, q_SD: Tensor, k_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([S, H], [B, H]): the queries' and the keys' part of the first layer."""
        w_q, w_k = self.first()
        return linear(q_SD, w_q, self.bias), linear(k_BD, w_k)

    def forward(self, q_SD: Tensor, k_BD: Tensor, sample_P: Tensor, behaviour_P: Tensor) -> Tensor:
        h_SH, h_BH = self.project(q_SD, k_BD)
        h_PH = h_SH.index_select(0, sample_P) + h_BH.index_select(0, behaviour_P)
        if "p" in self.parts:
            product_PD = q_SD.index_select(0, sample_P) * k_BD.index_select(0, behaviour_P)
            h_PH = h_PH + nn.functional.linear(product_PD, self.weight["p"])
        out_P: Tensor = self.rest(self.act(h_PH)).squeeze(1)
        return out_P


def attend(
    unit: PairMLP,
    q_SD: Tensor,
    k_BD: Tensor,
    v_BE: Tensor,
    sample_P: Tensor,
    behaviour_P: Tensor,
    *,
    softmax: bool,
    scale: float = 1.0,
    times_B: Tensor | None = None,
) -> Tensor:
    """Return [S, E]: Σ w·v over the pairs of each sample, w = scale·unit(q, k), or its softmax over them.

    times_B: how many behaviours, all alike, each one stands for, for a unit without Dice, whose statistics are those of
    all pairs; None: for one each. With compiled loops (`counts_repeats`), else the plain way.

    A sample without pairs has the zero vector. In blocks (with Numba `ctrkit.models.pair_net` or `pair_threads`, else
    `pair_blocks`), without second derivatives; under torch.compile and autocast as `attend_plain`.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(q_SD.device.type)
    if not plain and (run := net_loops(unit, q_SD)) is not None:
        return attend_by_net(run, unit, q_SD, k_BD, v_BE, (sample_P, behaviour_P), softmax, scale, times_B)
    if plain or (times_B is not None and not counts_repeats(unit)):
        pairs = sample_P, behaviour_P
        return attend_plain(unit, q_SD, k_BD, v_BE, *pairs, softmax=softmax, scale=scale, times_B=times_B)
    activations = [unit.act, *list(unit.rest)[1::2]]
    product_HD = unit.weight["p"] if "p" in unit.parts else None
    # The loops know nothing of other ranks' rows, which Dice's statistics are to be of.
    over_ranks = any(isinstance(module, Dice) and module.group is not None for module in activations)
    run, how = None if over_ranks else loops(q_SD), (activations, sample_P, behaviour_P, softmax, scale)
    out_SE: Tensor = Attend.apply(
        Pairs(*how) if run is None else CompiledPairs(run, *how, times_B),
        torch.is_grad_enabled(),
        *unit.project(q_SD, k_BD),
        *((None, None) if product_HD is None else (q_SD, k_BD)),
        product_HD,
        v_BE,
        *[_slope(module) for module in activations],
        *[parameter for linear in list(unit.rest)[::2] for parameter in (linear.weight, linear.bias)],
    )
    return out_SE


def counts_repeats(unit: PairMLP) -> bool:
    """Say whether `attend` with this unit is made for behaviours that count several times."""
    return not _has_dice(unit) and loops(unit.bias) is not None


def _has_dice(unit: PairMLP) -> bool:
    return any(isinstance(module, Dice) for module in unit.modules())


def _slope(module: nn.Module) -> Tensor | None:
    if isinstance(module, PReLU):
        return module.weight
    return module.a_H if isinstance(module, Dice) else None


def attend_plain(
    unit: PairMLP,
    q_SD: Tensor,
    k_BD: Tensor,
    v_BE: Tensor,
    sample_P: Tensor,
    behaviour_P: Tensor,
    *,
    softmax: bool,
    scale: float = 1.0,
    times_B: Tensor | None = None,
) -> Tensor:
    """Return what `attend` returns, one whole matrix after the other."""
    if times_B is not None and _has_dice(unit):
        raise ValueError("Dice has to see every pair")
    w_P = unit(q_SD, k_BD, sample_P, behaviour_P) * scale
    times_P = None if times_B is None else times_B.to(w_P.dtype).index_select(0, behaviour_P)
    if softmax:
        w_P = segment_softmax(w_P if times_P is None else w_P + times_P.log(), sample_P, len(q_SD))
    elif times_P is not None:
        w_P = w_P * times_P
    return segment_sum(v_BE.index_select(0, behaviour_P) * w_P.unsqueeze(1), sample_P, len(q_SD))
