"""What repairs know of a pruned block: dense weights and outputs, and the inputs that reach each linear now."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from dass_exp.engine.activation_cache import ActivationCache, CachedTensor
from dass_exp.engine.attention_replay import AttentionReplay
from dass_exp.engine.capture import Batch, replaced_forward
from dass_exp.engine.data_parallel import add_up, add_up_statistics
from dass_exp.engine.observers import routes_of
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.models.decoder import Decoder
from dass_exp.models.families import DOWN, FC2, GATE, READER_OF, READERS, UP, Role
from dass_exp.repair.base import Regression, Repair
from dass_exp.statistics import Gram

_WRITERS = READER_OF.keys()
MAX_KEPT_NEURONS = 1 << 30  # bytes of intermediate activations kept from the last collection for the pass on


class RegressionSums:
    """The sums of a :class:`Regression`, collected while tokens pass; float32, one sequence after the other."""

    def __init__(self, linear: LinearView) -> None:
        shape, device = (linear.matrix.out_features, linear.matrix.in_features), linear.matrix.parameter.device
        self.gram = Gram(shape[1], device)
        self.cross = torch.zeros(shape, dtype=torch.float32, device=device)
        self.energy = torch.zeros(shape[0], dtype=torch.float32, device=device)

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add one sequence: its inputs [tokens, in], and the dense outputs [tokens, out] without bias."""
        inputs, outputs = inputs.float(), outputs.float()
        self.gram.update(inputs)
        self.cross.addmm_(outputs.T, inputs)
        self.energy += outputs.square().sum(0)

    def regression(self) -> Regression:
        return Regression(self.gram.matrix, self.cross, self.energy)


class DensePass:
    """What repairs need of a block while it is dense: outputs of linears, the targets of later regressions, and inputs.

    The outputs of experts are not recorded: they are computed again from the dense weights.

    Args:
        decoder: of the model.
        index: of the block.
        scope: what is pruned.
        repair: says what it needs.
        cache: where activations wait.
    """

    def __init__(self, decoder: Decoder, index: int, scope: str, repair: Repair, cache: ActivationCache) -> None:
        self.decoder, self.index, self._cache = decoder, index, cache
        units = decoder.units(index, scope)
        self.units = {name: unit for name, unit in units.items() if _WRITERS & unit.matrices.keys()}
        self.outputs: dict[str, list[CachedTensor]] | None = None
        self.inputs: list[CachedTensor] = []  # of the MLP, by batch
        self.routes: list[CachedTensor] = []  # the experts chosen for each token
        self._hooks: list[tuple[nn.Module, Callable[..., None], bool]] = []
        if repair.follows_inputs or repair.needs_mlp_tokens:
            readers = [site for site in decoder.sites(index, scope) if site.role in READERS]
            self.outputs = {site.name: [] for site in readers if site.matrix.expert is None}
            for site in readers:
                if site.matrix.expert is None:
                    self._hooks.append((site.matrix.module, self._output_hook(self.outputs[site.name]), False))
        if repair.needs_mlp_tokens and self.units:
            unit = next(iter(self.units.values()))
            first = unit.matrices[next(role for role in unit.matrices if role in _WRITERS)]
            self._hooks.append((first.module, self._record_inputs, True))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the dense block runs."""
        with ExitStack() as stack:
            for module, hook, before in self._hooks:
                if before:
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    stack.enter_context(module.register_forward_hook(hook))
            yield

    def _output_hook(self, outputs: list[CachedTensor]) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            del args
            bias = getattr(module, "bias", None)
            outputs.append(self._cache.store(output if bias is None else output - bias))

        return record

    def _record_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        values = [*args, *kwargs.values()]
        self.inputs.append(self._cache.store(values[0]))
        if len(values) > 1:  # experts: hidden states, the chosen experts, their weights
            self.routes.append(self._cache.store(values[1]))


class BlockInRepair:
    """A pruned block as repairs see it (:class:`dass_exp.repair.base.PrunedBlock`).

    Args:
        before: what was recorded while the block was dense.
        batches: calibration batches in front of it.
        linears: that were pruned.
        dense: their weights before pruning, by name.
        results: their masks, by name.
        attention: replays the attention if it is not pruned.
    """

    def __init__(
        self,
        before: DensePass,
        batches: Sequence[Batch],
        linears: Sequence[LinearView],
        dense: Mapping[str, Tensor],
        results: Mapping[str, MaskResult],
        attention: AttentionReplay,
    ) -> None:
        self._before, self._batches = before, batches
        self._dense, self._results, self._attention = dense, results, attention
        order = list(Role)
        self.linears = sorted(linears, key=lambda linear: order.index(linear.role))
        self.units = before.units
        self._current: dict[str, Regression] = {}
        self._collected: Role | None = None
        self._neurons: dict[str, deque[Tensor]] = {}  # inputs of the last linear of the MLP, by batch
        self._kept_for: list[int] = []  # the versions of the weights that gave them

    @contextmanager
    def replaying_neurons(self) -> Iterator[None]:
        """Let the MLP start from the neurons of the last collection, if its first linears are what they were then."""
        with ExitStack() as stack:
            if self._neurons and self._versions() == self._kept_for:
                for module in {linear.matrix.module for linear in self.linears if linear.role in _WRITERS}:
                    features = sum(view.matrix.out_features for view in self.linears if view.matrix.module is module)
                    stack.enter_context(replaced_forward(module, partial(_zeros, features=features)))
                for linear in self.linears:
                    if linear.name in self._neurons:
                        replay = _replaying(linear.matrix.module.forward, self._neurons.pop(linear.name))
                        stack.enter_context(replaced_forward(linear.matrix.module, replay))
            yield

    def mlp_tokens(self, unit: str) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs of an MLP and what its dense weights give for them, without the bias of its last linear."""
        views = {linear.role: linear for linear in self.linears if linear.unit == unit}
        last = next((view for role, view in views.items() if role in (DOWN, FC2)), None)
        if last is None:
            return []
        inputs = [self._by_sequence(cached.load()) for cached in self._before.inputs]
        if last.matrix.expert is None and self._before.outputs is not None:
            outputs = [self._by_sequence(cached.load()) for cached in self._before.outputs[last.name]]
            return [pair for batch in zip(inputs, outputs, strict=True) for pair in zip(*batch, strict=True)]
        dense = {role: self.dense(view).float() for role, view in views.items()}
        pairs = []
        for number, sequences in enumerate(inputs):
            is_chosen: Tensor = self._before.routes[number].load() == last.matrix.expert  # type: ignore[assignment]
            chosen = is_chosen.any(1).view(len(sequences), -1)
            parts = [sequence[where].float() for sequence, where in zip(sequences, chosen, strict=True)]
            pairs += [(part, self.units[unit].mlp(part, dense)) for part in parts if len(part)]
        return pairs

    def _by_sequence(self, tokens: Tensor) -> Tensor:
        """Split [sequences, tokens, features], or one row for each token, into [sequences, tokens, features]."""
        return tokens.reshape(-1, self._batches[0].tokens, tokens.shape[-1])

    def dense(self, linear: LinearView) -> Tensor:
        """Return the weight before pruning, [out, in], in the model's dtype."""
        return self._dense[linear.name]

    def keep(self, linear: LinearView) -> Tensor:
        """Return the mask, bool [out, in]."""
        return self._results[linear.name].keep

    def regression(self, linear: LinearView) -> Regression:
        """Return the problem of a linear on the inputs that reach it now."""
        if self._before.outputs is None or linear.role not in READERS:
            return Regression.on_same_inputs(linear.statistic_of(Gram).matrix, self.dense(linear))
        if linear.statistic is not None and linear.statistic.uniform:  # an expert that few tokens have reached
            identity = torch.eye(linear.matrix.in_features, device=linear.matrix.parameter.device)
            return Regression.on_same_inputs(identity, self.dense(linear))
        if self._collected != linear.role:
            self._current = self._collect(linear.role)
            self._collected = linear.role
        return self._current.pop(linear.name)

    def _collect(self, role: Role) -> dict[str, Regression]:
        """Run the block as it is now, and collect the regressions of its linears with this role."""
        linears = [linear for linear in self.linears if linear.role == role]
        sums = {linear.name: RegressionSums(linear) for linear in linears}
        plain = [linear for linear in linears if linear.matrix.expert is None]
        routed = [linear for linear in linears if linear.matrix.expert is not None]
        if role in READER_OF.values() and self._neurons_fit(plain):
            self._neurons, self._kept_for = {linear.name: deque() for linear in plain}, self._versions()
        block = self._before.decoder.blocks[self._before.index]
        with ExitStack() as stack:
            stack.enter_context(self._attention.replaying(again=True))
            for linear in plain:
                collect = self._collecting(linear, sums[linear.name])
                stack.enter_context(replaced_forward(linear.matrix.module, collect))
            if routed:
                stack.enter_context(replaced_forward(routed[0].matrix.module, self._collecting_experts(routed, sums)))
            for batch in self._batches:
                batch.run_block(block, self._before.index)
        add_up_statistics(entry.gram for entry in sums.values())
        add_up(total for entry in sums.values() for total in (entry.cross, entry.energy))
        return {name: entry.regression() for name, entry in sums.items()}

    def _collecting(self, linear: LinearView, sums: RegressionSums) -> Callable[[Tensor], Tensor]:
        """Return a forward that collects the inputs of a linear; its output, which nobody reads, is zero."""
        outputs = iter((self._before.outputs or {})[linear.name])
        features = linear.matrix.out_features

        def forward(inputs: Tensor) -> Tensor:
            targets = next(outputs).load()
            tokens = self._batches[0].tokens
            pairs = (tensor.reshape(-1, tokens, tensor.shape[-1]) for tensor in (inputs, targets))
            for sequence, target in zip(*pairs, strict=True):
                sums.update(sequence, target)
            if linear.name in self._neurons:
                self._neurons[linear.name].append(inputs)
            return _zeros(inputs, features)

        return forward

    def _versions(self) -> list[int]:
        return [linear.matrix.parameter._version for linear in self.linears if linear.role in _WRITERS]

    def _neurons_fit(self, linears: Sequence[LinearView]) -> bool:
        """Whether the inputs of these linears may be kept."""
        tokens = sum(batch.sequences * batch.tokens for batch in self._batches)
        size = sum(linear.matrix.in_features * linear.weight.dtype.itemsize for linear in linears)
        return 0 < size * tokens <= MAX_KEPT_NEURONS

    def _collecting_experts(
        self, linears: Sequence[LinearView], sums: Mapping[str, RegressionSums]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a forward of the experts' module that collects at each one's down; its output is zero."""
        module, table = linears[0].matrix.module, self._before.decoder.family.experts
        apply_gate: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]
        views = {(linear.matrix.expert, linear.role): linear for linear in self.linears}
        tokens = self._batches[0].tokens

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            del top_k_weights
            routes = routes_of(top_k_index, len(getattr(module, table.gate_up)), tokens)  # type: ignore[union-attr]
            for down in linears:
                expert = down.matrix.expert
                token, _, lengths = routes[expert]  # type: ignore[index]
                before = torch.cat([self.dense(views[expert, role]) for role in (GATE, UP)])
                now = getattr(module, table.gate_up)[expert]  # type: ignore[union-attr]
                for sequence in hidden_states[token].split(lengths):
                    neurons = apply_gate(apply_linear(sequence, now))
                    target = apply_linear(apply_gate(apply_linear(sequence, before)), self.dense(down))
                    sums[down.name].update(neurons, target)
            return torch.zeros_like(hidden_states)

        return forward


def _zeros(inputs: Tensor, features: int) -> Tensor:
    return inputs.new_zeros(*inputs.shape[:-1], features)


def _replaying(forward: Callable[..., Any], kept: deque[Tensor]) -> Callable[..., Any]:
    """Return a forward that takes one kept input after the other instead of its own."""

    def replay(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return forward(kept.popleft())

    return replay
