"""A network's weights: in fp32 for Adam, the EMA and the checkpoints, and in the precision of the computation."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ganserve_trainer.train import processes

_COPIED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Weights:
    """The fp32 weights of a network with Adam's state and, for bf16, the copies that its layers compute with.

    Adam updates the fp32 weights, because its steps are too small for bf16 (Micikevicius et al., 2018, section 3.1).
    The copies, of dense and convolutional layers, are refreshed once a step. Autocast alone would convert each weight
    at every use. Weights whose names are in `frozen` keep their values.
    """

    def __init__(
        self, network: nn.Module, betas: tuple[float, float], *, bf16: bool, frozen: Collection[str] = ()
    ) -> None:
        self.network = network
        self.learning_rate = 0.0
        self.masters: dict[str, nn.Parameter] = dict(network.named_parameters())
        self._adam = torch.optim.Adam(self.masters.values(), betas=(float(betas[0]), float(betas[1])), fused=True)
        for master in self.masters.values():
            # Adam would create this state at a weight's first step; a checkpoint from before that step needs it, too.
            self._adam.state[master] = {
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
                "step": torch.zeros((), device=master.device),
            }
        self._copies: dict[str, nn.Parameter] = {}
        for path, layer in network.named_modules():
            if not bf16 or not isinstance(layer, _COPIED):
                continue
            # Weights under spectral normalisation belong to its own module, and stay in fp32.
            for name, parameter in layer.named_parameters(path, recurse=False):
                self._copies[name] = nn.Parameter(parameter.detach().to(torch.bfloat16))
                setattr(layer, name.rpartition(".")[2], self._copies[name])
        # Stored as lists, because collecting them takes longer than using them.
        self._held = []
        for name, parameter in network.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
            else:
                self._held.append(parameter)
        self.buffers = list(network.buffers())  # such as BatchNorm's statistics

    def requires_grad_(self, wanted: bool) -> None:
        """Set whether to compute gradients with respect to the weights."""
        for parameter in self._held:
            parameter.requires_grad_(wanted)

    def descend(self, objectives: Iterable[Tensor]) -> None:
        """Take one step of Adam with the gradient of the objectives' sum, averaged over processes.

        Each objective's graph is freed before the next objective is computed. Weights without a gradient are skipped.
        """
        for parameter in self._held:
            parameter.grad = None
        for number, objective in enumerate(objectives):
            objective.backward()
            self._take_gradients(add=number > 0)
        with torch.no_grad():
            processes.average_gradients(self.masters.values())
            self._adam.param_groups[0]["lr"] = self.learning_rate
            self._adam.step()
            self._refresh()

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Clip every weight to -limit…limit."""
        for master in self.masters.values():
            master.clamp_(-limit, limit)
        self._refresh()

    def gradients(self) -> list[Tensor]:
        """Return the last step's gradients, for the weights that had one."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the network's state, with weights in fp32."""
        return self.network.state_dict() | {name: self.masters[name].detach() for name in self._copies}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return Adam's moments and steps, by weight."""
        return {name: self._adam.state[master] for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], optimizer_state: dict[str, dict[str, Tensor]]) -> None:
        """Load the results of `state_dict` and `optimizer_state`.

        Raises:
            RuntimeError: the state is from another network.
            KeyError: the optimiser's state is from another network.
        """
        self.network.load_state_dict(state)
        for name in self._copies:
            self.masters[name].copy_(state[name])
        for name, mine in self.optimizer_state().items():
            for key, value in mine.items():
                value.copy_(optimizer_state[name][key])
        self._refresh()

    @torch.no_grad()
    def _take_gradients(self, *, add: bool) -> None:
        """Move the copies' gradients to the fp32 weights, where their sum keeps its precision."""
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
            copy.grad = None
        if mine:
            (torch._foreach_add_ if add else torch._foreach_copy_)(mine, theirs)

    def _refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [self.masters[name] for name in self._copies])
