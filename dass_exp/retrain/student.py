"""A pruned model in training: the tensors that are trained, in the place of those that the model holds."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dass_exp.engine.capture import eval_mode
from dass_exp.engine.verify import VerificationError
from dass_exp.errors import UserError
from dass_exp.evaluate.head import last_hidden, positions_at_once, training_losses
from dass_exp.models.decoder import Decoder
from dass_exp.retrain.base import Retraining


class Student(nn.Module):
    """What is trained of a model, as parameters; a call gives the loss of the model with these tensors in place.

    The model itself is no submodule, so that a checkpoint holds what is trained and nothing else. It keeps its weights
    until :meth:`write`. Masks are part of the computation, so a removed weight has no gradient and stays zero.

    Args:
        model: pruned.
        decoder: of the model.
        keep: masks, bool [out, in] by name of the linear.
        retraining: what to train.
        scope: of the pruning.
        seed: of random starts.

    Raises:
        UserError: nothing can be trained, or a tensor lies in the scope with one of its parts only.
    """

    def __init__(
        self, model: Any, decoder: Decoder, keep: Callable[[str], Tensor], retraining: Retraining, scope: str, seed: int
    ) -> None:
        super().__init__()
        self._held = {"model": _Loss(model)}  # in a mapping: a module that is an attribute would be a submodule
        masks = _masks(decoder, keep, scope)
        names = {parameter: f"model.{name}" for name, parameter in model.named_parameters()}
        self._masks = {names[parameter]: mask for parameter, mask in masks.items()}
        if retraining.trains_vectors:
            head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
            vectors = [parameter for parameter in names if parameter.ndim == 1 and id(parameter) not in head]
            chosen: dict[str, Tensor | None] = dict.fromkeys(names[parameter] for parameter in vectors)
        else:
            chosen = dict(self._masks)
        if not chosen:
            raise UserError(f"retrain={retraining.name}: this model has no parameter that it trains; choose another")
        generator = torch.Generator().manual_seed(seed)
        own = {name: parameter.data for parameter, name in names.items()}
        self._masked = {name: own[name] for name in self._masks}
        self._targets = {name: own[name] for name in chosen}
        self.loss: Tensor | float = math.nan  # of the last call
        self.parts = nn.ModuleList(retraining.part(own[name], mask, generator) for name, mask in chosen.items())

    def forward(self, input_ids: Tensor, dense_hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Return the mean loss over the predicted tokens.

        Args:
            input_ids: int64 [windows, tokens].
            dense_hidden: [windows, tokens, features], the input of the head in the dense model; None for the loss of
                the next token.
        """
        tensors = {
            name: part().to(target.dtype)
            for (name, target), part in zip(self._targets.items(), self.parts, strict=True)
        }
        module = self._held["model"]
        reference = None if dense_hidden is None else dense_hidden.to(self.device)
        with eval_mode(module):
            loss = functional_call(module, tensors, (input_ids.to(self.device), reference), tie_weights=True)
        self.loss = loss.detach()
        return {"loss": loss}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self._targets.values())).device

    @torch.no_grad()
    def write(self) -> None:
        """Write the trained tensors into the model.

        Raises:
            VerificationError: a removed weight is not zero; the message names the tensor.
        """
        for target, part in zip(self._targets.values(), self.parts, strict=True):
            target.copy_(part())
        for name, weight in self._masked.items():  # also where only norms and biases are trained
            if bool((weight[~self._masks[name]] != 0).any()):
                raise VerificationError(f"{name.removeprefix('model.')}: retraining moved a weight that was removed")


class _Loss(nn.Module):
    """The loss of a model; logits are computed a few positions at a time, and again for their gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)

    def forward(self, ids: Tensor, dense: Tensor | None) -> Tensor:
        hidden = last_hidden(self.model, ids)[:, :-1].flatten(0, 1)
        size, targets = positions_at_once(self.model), ids[:, 1:].flatten()
        references = [None] * len(targets.split(size)) if dense is None else dense[:, :-1].flatten(0, 1).split(size)
        parts: Any = zip(hidden.split(size), targets.split(size), references, strict=True)
        losses = [checkpoint(training_losses, self.model, *part, use_reentrant=False) for part in parts]
        return torch.cat(losses).mean()


def _masks(decoder: Decoder, keep: Callable[[str], Tensor], scope: str) -> dict[nn.Parameter, Tensor]:
    """Return the mask of each tensor that holds a linear of the scope, bool of its shape."""
    masks: dict[Any, Tensor] = {}
    covered: dict[Any, int] = {}
    for index in range(len(decoder.blocks)):
        for site in decoder.sites(index, scope):
            tensor = site.matrix.parameter
            mask = masks.setdefault(tensor, torch.ones_like(tensor, dtype=torch.bool, requires_grad=False))
            dataclasses.replace(site.matrix, parameter=mask).write(keep(site.name).to(mask.device))
            covered[tensor] = covered.get(tensor, 0) + site.matrix.out_features * site.matrix.in_features
            if covered[tensor] > tensor.numel():
                raise UserError(f"retrain: two linears share the weight of {site.name}; it cannot be retrained")
    for index in range(len(decoder.blocks)):
        for site in decoder.sites(index, scope):
            if covered[site.matrix.parameter] != site.matrix.parameter.numel():
                problem = f"{site.name} shares its tensor with linears outside of scope={scope}"
                raise UserError(f"retrain: {problem}; set scope=all, or choose retrain=norms")
    return masks
