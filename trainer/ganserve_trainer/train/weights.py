"""A network's weights: as Adam, the average and the checkpoints see them, and as the device computes on them."""

from typing import Any

import torch
from torch import Tensor, nn

from ganserve_trainer.train import processes

_COPIED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_EPSILON = 1e-8  # Adam's own (Kingma & Ba, 2015)


class Weights:
    """The fp32 weights of a network with Adam's state, and with bf16 the copies of them that its layers hold.

    Adam moves the fp32 weights, by steps too small for bf16 (Micikevicius et al., 2018, section 3.1); the copies, of
    dense and convolutional layers, follow once a step. Autocast alone converts each weight again at every use.
    """

    def __init__(self, network: nn.Module, betas: tuple[float, float], *, bf16: bool) -> None:
        self.network = network
        self.learning_rate = 0.0
        self._betas = betas
        self.masters: dict[str, nn.Parameter] = dict(network.named_parameters())
        self._moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.masters.items()}
        self._steps = {name: torch.zeros((), device=master.device) for name, master in self.masters.items()}
        self._copies: dict[str, nn.Parameter] = {}
        for path, layer in network.named_modules():
            if not bf16 or not isinstance(layer, _COPIED):
                continue
            # Weights under spectral normalisation belong to a layer of its own, and keep their precision.
            for name, parameter in layer.named_parameters(path, recurse=False):
                self._copies[name] = nn.Parameter(parameter.detach().to(torch.bfloat16))
                setattr(layer, name.rpartition(".")[2], self._copies[name])
        # Kept as lists: collecting them takes longer than using them.
        self._held = list(network.parameters())
        self.buffers = list(network.buffers())  # BatchNorm's statistics, for one

    def requires_grad_(self, wanted: bool) -> None:
        """Set whether gradients with respect to the weights are computed."""
        for parameter in self._held:
            parameter.requires_grad_(wanted)

    def descend(self, objective: Tensor) -> None:
        """Take one step of Adam by the objective's gradient, the mean over processes; weights without one stay."""
        for parameter in self._held:
            parameter.grad = None
        objective.backward()
        with torch.no_grad():
            self._take_gradients()
            processes.average_gradients(self.masters.values())
            moved = [name for name, master in self.masters.items() if master.grad is not None]
            steps = [self._steps[name] for name in moved]
            torch._foreach_add_(steps, 1)
            # What torch.optim.Adam(fused=True) comes down to, without its 0.3 ms a step of looking up.
            torch._fused_adam_(
                [self.masters[name] for name in moved],
                self.gradients(),
                [self._moments[name][0] for name in moved],
                [self._moments[name][1] for name in moved],
                [],
                steps,
                lr=self.learning_rate,
                beta1=self._betas[0],
                beta2=self._betas[1],
                eps=_EPSILON,
                weight_decay=0.0,
                amsgrad=False,
                maximize=False,
            )
            self._refresh()

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Bring every weight into -limit…limit."""
        for master in self.masters.values():
            master.clamp_(-limit, limit)
        self._refresh()

    def gradients(self) -> list[Tensor]:
        """Return the last step's gradients, of those weights that had one."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the network's state, its weights in fp32."""
        return self.network.state_dict() | {name: self.masters[name].detach() for name in self._copies}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return Adam's moments and steps, by weight."""
        return {
            name: {"exp_avg": first, "exp_avg_sq": second, "step": self._steps[name]}
            for name, (first, second) in self._moments.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], optimizer_state: dict[str, dict[str, Tensor]]) -> None:
        """Load what `state_dict` and `optimizer_state` returned.

        Raises:
            RuntimeError: the state is that of another network.
            KeyError: the optimiser's is.
        """
        self.network.load_state_dict(state)
        for name in self._copies:
            self.masters[name].copy_(state[name])
        for name, mine in self.optimizer_state().items():
            for key, value in mine.items():
                value.copy_(optimizer_state[name][key])
        self._refresh()

    def _take_gradients(self) -> None:
        theirs, mine = [], []
        for name, copy in self._copies.items():
            master = self.masters[name]
            if copy.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
            theirs.append(copy.grad)
            mine.append(master.grad)
        if mine:
            torch._foreach_copy_(mine, theirs)

    def _refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [self.masters[name] for name in self._copies])
