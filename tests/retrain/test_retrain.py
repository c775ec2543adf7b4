"""Retraining: what is trained moves, what pruning removed never does, and an interruption changes no bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support import contains
from torch.nn.functional import cross_entropy

import dass_exp
from dass_exp.data.texts import Text
from dass_exp.engine.verify import VerificationError
from dass_exp.errors import NumericalError, UserError
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES
from dass_exp.retrain import checkpoints, train
from dass_exp.retrain.full import Full
from dass_exp.retrain.lora import LoRA
from dass_exp.retrain.norms import Norms
from dass_exp.retrain.parts import MaskedLowRank, Values
from dass_exp.retrain.student import Student
from dass_exp.retrain.train import TrainingData, TrainingHooks, training_order


class Words(Text):
    """A text that nobody reads."""

    identity = {"words": 3}  # noqa: RUF012 - a property in the base class

    def documents(self):
        return ["one two three"]


KINDS = {"full": Full, "lora": LoRA, "norms": Norms}


def how(kind="full", **settings):
    return KINDS[kind](**{"text": Words(), "steps": 3, "lr": 1e-2, "batch_size": 2, "seq_len": 12, **settings})


@pytest.fixture(name="pruned")
def pruned_fixture(tiny_model):
    """A function: a model of a family pruned to 2:4 by magnitude, and its masks."""

    def make(family="llama", scope="all"):
        model = tiny_model(family)
        return model, dict(dass_exp.prune(model, None, "magnitude", "2:4", scope).masks)

    return make


def student_of(model, masks, retraining, scope="all"):
    return Student(model, decoder_of(model), masks.__getitem__, retraining, scope, seed=0)


def trained(model, masks, retraining, tokens, folder, scope="all", hooks=None, dense=None):
    student = student_of(model, masks, retraining, scope)
    return train.train(student, retraining, TrainingData(tokens, dense, 0), folder, hooks or TrainingHooks(dict))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_zeros_never_move_and_only_what_is_trained_does(pruned, tokens, tmp_path, family, kind):
    model, masks = pruned(family)
    before = copy.deepcopy(model.state_dict())
    trained(model, masks, how(kind), tokens, tmp_path)
    sites = [site for index in range(2) for site in decoder_of(model).sites(index, "all")]
    assert all(bool((site.matrix.weight[~masks[site.name]] == 0).all()) for site in sites)
    in_scope = {id(site.matrix.parameter) for site in sites}
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    chosen = {
        name
        for name, parameter in model.named_parameters()
        if (parameter.ndim == 1 and id(parameter) not in head if kind == "norms" else id(parameter) in in_scope)
    }
    if FAMILIES[family].experts is None:
        # keys have no effect through a bias of their own: the same number is added to all scores of a query
        assert {name for name in moved ^ chosen if "bias" not in name} == set()
    assert moved <= chosen and moved


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_gives_the_loss_of_the_last_forward(pruned, tokens, tmp_path, kind):
    model, masks = pruned()
    retraining = how(kind)
    student = student_of(model, masks, retraining)
    train.train(student, retraining, TrainingData(tokens, None, 0), tmp_path, TrainingHooks(dict))
    with torch.no_grad():
        inside = student(tokens)["loss"]
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    assert torch.equal(inside, cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").mean())


def test_the_gradients_are_those_of_the_masked_model(pruned, tokens):
    model, masks = pruned()
    student = student_of(model, masks, how())
    student(tokens)["loss"].backward()
    reference = copy.deepcopy(model).requires_grad_(True)
    reference(tokens, labels=tokens).loss.backward()
    named = dict(reference.named_parameters())
    for name, part in zip(student._targets, student.parts, strict=True):
        expected = named[name.removeprefix("model.")].grad * part.keep
        torch.testing.assert_close(part.values.grad, expected, rtol=1e-4, atol=1e-7)
        assert bool((part.values.grad[~part.keep] == 0).all())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_divergence_is_that_of_full_logits(tiny_model, pruned, tokens, family):
    dense, (model, masks) = tiny_model(family), pruned(family)
    hidden = dense.base_model(tokens).last_hidden_state.detach()
    student = student_of(model, masks, how(loss="kl"))
    loss = student(tokens, hidden)["loss"]
    loss.backward()
    ours, theirs = (each(tokens).logits[:, :-1].double().log_softmax(-1) for each in (model, dense))
    assert float(loss.detach()) == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    assert any(bool(part.values.grad.any()) for part in student.parts)


@pytest.mark.thorough
def test_training_lowers_the_loss_it_is_about(tiny_model, pruned, tokens, tmp_path):
    hidden = tiny_model("llama").base_model(tokens).last_hidden_state.detach()
    for loss, dense in (("next_token", None), ("kl", hidden)):
        model, masks = pruned()
        curve = trained(model, masks, how(loss=loss, steps=12, curve=[4, 8]), tokens, tmp_path / loss, dense=dense)
        assert [entry["step"] for entry in curve] == [4, 8, 12]
        losses = [entry["loss"] for entry in curve]
        assert losses == sorted(losses, reverse=True)


def test_a_mask_is_part_of_the_computation():
    keep = torch.tensor([[True, False], [False, True]])
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    part = Values(start, keep)
    part.values.data += 5  # whatever an optimizer does
    assert part().tolist() == [[6.0, 0.0], [0.0, 7.0]]
    low_rank = MaskedLowRank(start, keep, 1, 2.0, torch.Generator().manual_seed(0))
    assert torch.equal(low_rank(), start)
    low_rank.first.data, low_rank.second.data = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0], [3.0]])
    assert low_rank().tolist() == [[1 + 2 * 1.0, 0.0], [0.0, 2 + 2 * 30.0]]


def test_a_removed_weight_that_moved_is_named(pruned):
    model, masks = pruned()
    student = student_of(model, masks, how())
    student.parts[0].keep = None  # the mask is lost; what was removed is free
    student.parts[0].values.data += 1
    with pytest.raises(VerificationError, match=r"q_proj\.weight: retraining moved a weight that was removed"):
        student.write()


def test_norms_verify_the_weights_that_they_leave_alone(pruned):
    model, masks = pruned()
    student = student_of(model, masks, how("norms"))
    student.write()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj\.weight: retraining moved a weight"):
        student.write()


def test_half_precision_trains_float32_values(pruned, tokens, tmp_path):
    model, masks = pruned()
    model = model.to(torch.bfloat16)
    student = student_of(model, masks, how(lr=1e-5))
    assert {part.values.dtype for part in student.parts} == {torch.float32}
    before = [part.values.detach().clone() for part in student.parts]
    train.train(student, how(lr=1e-5), TrainingData(tokens, None, 0), tmp_path, TrainingHooks(dict))
    assert all(bool((part.values != start).any()) for part, start in zip(student.parts, before, strict=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class Stopped(Exception):
    """In place of a kill."""


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_continues_bit_for_bit(pruned, tokens, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train, "SAVED_EVERY", 0.0)
    retraining, mark = how(kind, steps=8, curve=[2, 5]), {"run": 1}
    whole, masks = pruned()
    expected = trained(whole, masks, retraining, tokens, tmp_path / "whole")
    for stop in (1, 4, 6):
        steps = iter(range(1, 9))

        def advance(steps=steps, stop=stop):
            if next(steps) == stop:
                raise Stopped

        folder, (model, _) = tmp_path / str(stop), pruned()
        with pytest.raises(Stopped):
            trained(model, masks, retraining, tokens, folder, hooks=TrainingHooks(dict, advance, mark))
        counted, (model, _) = [], pruned()
        hooks = TrainingHooks(dict, lambda counted=counted: counted.append(1), mark)
        assert trained(model, masks, retraining, tokens, folder, hooks=hooks) == expected
        assert len(counted) == 8
        assert all(map(torch.equal, model.parameters(), whole.parameters()))


def test_only_a_complete_checkpoint_of_this_training_is_continued(pruned, tokens, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train, "SAVED_EVERY", 0.0)
    model, masks = pruned()
    trained(model, masks, how(steps=4), tokens, tmp_path, hooks=TrainingHooks(dict, fingerprint={"run": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "checkpoint-5").mkdir()  # a kill while it was written
    damaged = tmp_path / "checkpoint-3" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert checkpoints.last_complete(tmp_path, {"run": 1}) == tmp_path / "checkpoint-2"
    assert "optimizer.pt: its content does not match its checksum" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoints.is_resumable(tmp_path)
    assert checkpoints.last_complete(tmp_path, {"run": 2}) is None
    assert "belongs to another training" in caplog.text
    assert not checkpoints.is_resumable(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(pruned, tokens, tmp_path):
    model, masks = pruned()
    with pytest.raises(NumericalError, match=r"the loss of retraining is (nan|inf) in step \d+; lower retrain\.lr"):
        trained(model, masks, how(lr=1e30), tokens, tmp_path)


def test_each_epoch_sees_every_window_once():
    order = training_order(5, 12, seed=0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    assert order == training_order(5, 12, seed=0) != training_order(5, 12, seed=1)
    assert training_order(5, 0, seed=0) == []
    examples = TrainingData(torch.arange(10).view(5, 2), torch.arange(10.0).view(5, 2, 1), 0).examples(12)
    assert [int(example["input_ids"][0]) // 2 for example in examples] == order
    assert all(torch.equal(example["dense_hidden"][:, 0].long(), example["input_ids"]) for example in examples)


def test_a_tensor_that_is_only_partly_in_the_scope_is_refused(pruned, tokens):
    model, masks = pruned("phi3")
    decoder = decoder_of(model)
    sites = [site for index in range(2) for site in decoder.sites(index, "attention")]
    assert {site.name.rpartition(".")[2] for site in sites} >= {"q", "k", "v"}  # one tensor
    assert student_of(model, masks, how(), "attention")

    class WithoutQueries:
        blocks = decoder.blocks

        def sites(self, index, scope):
            return (site for site in decoder.sites(index, scope) if site.role.value != "q")

    with pytest.raises(UserError) as refusal:
        Student(model, WithoutQueries(), masks.__getitem__, how(), "attention", 0)
    assert contains(str(refusal.value), ["qkv_proj", "scope=attention", "set scope=all"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, ["retrain.steps=-1"]),
        ({"lr": 0}, ["retrain.lr=0", "above 0"]),
        ({"lr": "fast"}, ["retrain.lr='fast'"]),
        ({"batch_size": 0}, ["retrain.batch_size=0"]),
        ({"seq_len": 1}, ["retrain.seq_len=1"]),
        ({"loss": "mse"}, ["retrain.loss='mse'", "next_token, kl"]),
        ({"curve": 3}, ["retrain.curve=3", "[10,100]"]),
        ({"curve": ["x"]}, ["retrain.curve='x'"]),
        ({"text": None}, ["retrain.text=None", "calibration.text"]),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UserError) as refusal:
        how(**settings)
    assert contains(str(refusal.value), words)


def test_settings_are_canonical():
    assert how(curve=[9, 2, 1, 2, 0]).curve == [1, 2]  # the start and the end are scored anyway
    assert json.loads(json.dumps(how("lora").settings()))["text"] == {"words": 3}
    with pytest.raises(UserError, match=r"retrain\.rank=0"):
        how("lora", rank=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_is_that_of_the_cpu(pruned, tokens, accelerator, kind):
    losses, values = [], []
    for device in ("cpu", "cuda:0"):
        model, masks = pruned()
        model.set_attn_implementation("eager")  # the pretended device has no gradient of fused attention
        student = student_of(model.to(device), masks, how(kind))
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, foreach=False)
        for _ in range(2):
            student(tokens)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        student.write()
        losses.append(float(student.loss))
        values.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *values))


@pytest.mark.parametrize("index", [0, 1])
def test_training_stays_on_the_device_of_the_model(index, tmp_path, accelerator, monkeypatch):
    """The Trainer would take the first GPU, double the batch for the second, and leave the first as the current one."""
    current = [index]

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *details):
            current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(-1, torch.device(device).index))
    monkeypatch.setattr(torch.cuda, "device", Current)
    device = torch.device("cuda", index)
    with train._as_current_device(device):
        arguments = train._arguments(how(batch_size=3), tmp_path, 0, device)
        assert (arguments.device, arguments.n_gpu, arguments.train_batch_size) == (device, 1, 3)
        assert arguments.place_model_on_device is False
        assert current == [index, index]
    assert current == [index]
