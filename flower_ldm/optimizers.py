"""Muon: orthogonalized momentum for the matrices of the hidden layers, AdamW for all other parameters.

Shapes: M matrices of equal shape, R rows, C columns.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

# Jordan 2024, "Muon: An optimizer for hidden layers in neural networks". They maximize the slope at zero, so that
# small singular values grow fast. After five iterations all lie between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
# The root mean square of AdamW's updates, relative to the learning rate, as measured by Liu et al. 2025, "Muon is
# scalable for LLM training", section 2.2. With it both optimizers share one learning rate and one weight decay.
ADAMW_RMS = 0.2


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, over its groups, in the order of its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_layout(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """What AdamW or `Muon` keeps of each parameter from its first gradient on, by name: tensors of these shapes."""
    return [
        {"momentum": parameter}
        if group.get("orthogonalize")
        else {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def hidden_matrices(layers: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear layers and convolutions in `layers`, but those with a single row."""
    kinds = (nn.Linear, nn.Conv2d)
    return [module.weight for module in layers.modules() if isinstance(module, kinds) and len(module.weight) > 1]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Move the singular values of `matrices` `(M, R, C)` close to 1, by Newton-Schulz iterations in `dtype`.

    The result approximates the nearest semi-orthogonal matrices.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.to(dtype)
    result /= matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None].to(dtype)
    result = result.transpose(1, 2).contiguous() if is_tall else result
    for _ in range(ITERATIONS):
        gram = result @ result.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        result = polynomial @ result
    return result.transpose(1, 2).contiguous() if is_tall else result


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a layer as a matrix `(R, C)` with one row for each output. Channels-last memory isn't copied."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def like_weight(matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`, in the shape of `weight`."""
    return matrix.reshape(weight.movedim(1, -1).shape).movedim(-1, 1)


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for matrices, AdamW for the rest, with one learning rate, schedule and state.

    For two-dimensional weights it takes the same updates as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which
    torch has from 2.9 on. It also takes convolutions, computes matrices of equal shape together, and computes in
    float32 where the device has no instructions for bfloat16: torch's Muon would emulate them.

    Args:
        matrices: weights of hidden layers, with two dimensions or more; the first is that of the outputs.
        others: all other parameters.
        dtype: type of the Newton-Schulz iterations.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        groups = [{"params": [*matrices], "orthogonalize": True}, {"params": [*others], "orthogonalize": False}]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)
        self.dtype = dtype

    def __setstate__(self, state: dict) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects a step count in the state of a matrix too

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update all parameters that have a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonalize"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonalize"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(as_matrix(weight).shape, []).append(weight)
        for shape, weights in by_shape.items():
            momenta = [self._momentum(weight) for weight in weights]
            gradients = [weight.grad for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
            updates = orthogonalize(torch.stack([as_matrix(update) for update in updates]), self.dtype)
            updates = [like_weight(*pair) for pair in zip(updates.to(weights[0].dtype), weights, strict=True)]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"] * ADAMW_RMS * max(shape) ** 0.5)

    def _momentum(self, weight: nn.Parameter) -> torch.Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]
