"""torch.compile where there is a compiler, and the network as it is where there is none."""

import inspect

import torch
from torch import Tensor, nn

from ctrkit.progress import say


class Adam(torch.optim.Adam):
    """torch.optim.Adam without the parts that import the compiler when first called, so that training starts 1.5 s
    sooner. The optimiser is never compiled here."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def compiled(network: nn.Module, device: str) -> nn.Module:
    """Return the network through torch.compile, for batches of any size, or the network itself after saying why.

    Parameters are shared. A part that torch cannot compile runs as it is, which torch tells.
    """
    if why := _cannot_compile(device):
        say(f"train: nothing is compiled, and training is as without train.compile: {why}")
        return network
    torch._dynamo.config.suppress_errors = True
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler
    module: nn.Module = torch.compile(network, dynamic=True)  # type: ignore[assignment]
    return module


def _cannot_compile(device: str) -> str:
    """Return why a function of one line, and its gradient, cannot be compiled; "" if they can."""

    def line(x: Tensor) -> Tensor:
        return (x * 2 + 1).relu().sum()

    try:
        torch.autograd.backward(torch.compile(line)(torch.ones(8, device=device, requires_grad=True)))
    except Exception as e:  # whatever is missing, in the words of whoever misses it: torch, a compiler, Triton
        return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
    return ""
