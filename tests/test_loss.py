"""The loss over a large vocabulary: the naive one's value and gradients, whatever trains and however it is split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lingraft.errors import ModelError
from lingraft.model import rows
from lingraft.model.rows import TrainableRows, VocabularyTraining
from lingraft.training import cross_entropy
from lingraft.training.batches import IGNORED
from lingraft.training.cross_entropy import FrozenMatrixLoss, Scratch, TrainedMatrixLoss
from lingraft.training.loss import NextTokenLoss

NEW_IDS = [5, 400, 401, 402, 639]
ROWS = [("new", "none"), ("none", "new"), ("new", "new"), ("none", "all"), ("new", "all"), ("all", "all")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny vocabularies go through many blocks and chunks as well."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 100)
    monkeypatch.setitem(cross_entropy.BLOCK_LOGITS, "cpu", 1)
    monkeypatch.setitem(cross_entropy.CHUNK_POSITIONS, "cpu", 11)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 9 * tiny.VOCABULARY * 4)


def model_of(family: str, tied: bool, softcap: float | None = None) -> Any:
    """A model of large weights, so that its logits differ enough to matter."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[family](tied).eval()
    if softcap is not None:
        model.config.get_text_config().final_logit_softcapping = softcap
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            parameter.requires_grad_(False)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids_BT = torch.randint(0, tiny.VOCABULARY, (2, 20))
    labels_BT = torch.randint(0, tiny.VOCABULARY, (2, 20))
    ids_BT[0, 3] = ids_BT[1, 9] = 400
    labels_BT[0, 5], labels_BT[1, 8] = 401, 639
    labels_BT[1, :7] = IGNORED
    return ids_BT, labels_BT, torch.arange(20).expand(2, -1)


def naive(model: Any, softcap: float | None) -> Tensor:
    """Every logit of the batch at once, through the modules' own forward."""
    ids_BT, labels_BT, position_ids_BT = batch()
    hidden_BTD = model.base_model(input_ids=ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state
    logits_BTV = model.get_output_embeddings()(hidden_BTD).float()
    if softcap is not None:
        logits_BTV = torch.tanh(logits_BTV / softcap) * softcap
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("input_rows", "output_rows"), ROWS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "llama", "gemma3n"])
def test_value_and_gradients_are_those_of_the_naive_loss(
    family: str, tied: bool, input_rows: str, output_rows: str, softcap: float | None
) -> None:
    model = model_of(family, tied, softcap)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 3n brings its own
    parameters = VocabularyTraining(model, input_rows, output_rows, NEW_IDS).parameters()
    expected = naive(model, softcap)
    expected.backward()
    wanted = {}
    for name, parameter in parameters.items():
        wanted[name], parameter.grad = parameter.grad, None
    loss = NextTokenLoss(model)
    for _ in range(2):  # two micro-batches add up
        value = loss(*batch(), scale=0.25)
        value.backward()
    torch.testing.assert_close(value * 4, expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scale = wanted[name].abs().max()
        torch.testing.assert_close(parameter.grad * 2 / scale, wanted[name] / scale, rtol=0, atol=2e-6, msg=name)


def test_two_logits_by_hand() -> None:
    """Logits 0 and ln 3, label the second: p = (1/4, 3/4), loss ln(4/3), the gradient of the logits p − y."""
    hidden_ND = torch.tensor([[1.0]], requires_grad=True)
    values_VD = nn.Parameter(torch.tensor([[0.0], [math.log(3)]]))
    loss = TrainedMatrixLoss.apply(hidden_ND, values_VD, torch.tensor([1]), None, 1.0, Scratch(), False)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert values_VD.grad is not None
    assert values_VD.grad.flatten().tolist() == pytest.approx([0.25, -0.25])
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.item() == pytest.approx(-0.25 * math.log(3))


def test_the_gradient_of_a_whole_matrix_stays_in_one_buffer() -> None:
    values_VD = nn.Parameter(torch.randn(50, 4))
    places = set()
    for _ in range(3):
        TrainedMatrixLoss.apply(torch.randn(6, 4), values_VD, torch.arange(6), None, 1.0, Scratch(), False).backward()
        assert values_VD.grad is not None
        places.add(values_VD.grad.data_ptr())
    assert len(places) == 1


def test_a_whole_matrix_refuses_to_be_scaled_afterwards() -> None:
    loss = TrainedMatrixLoss.apply(
        torch.randn(6, 4), nn.Parameter(torch.randn(50, 4)), torch.arange(6), None, 1.0, Scratch(), False
    )
    with pytest.raises(AssertionError, match="scale the loss by its own argument"):
        (loss * 2).backward()


def test_unseen_ids_are_out_of_the_softmax() -> None:
    torch.manual_seed(0)
    hidden_ND, matrix_VD, labels_N = torch.randn(7, 4, requires_grad=True), torch.randn(300, 4), torch.arange(7)
    unseen = [20, 99, 100, 299]
    loss = FrozenMatrixLoss.apply(hidden_ND, None, matrix_VD, labels_N, None, unseen, Scratch())
    (own,) = torch.autograd.grad(loss, hidden_ND)
    logits_NV = (hidden_ND @ matrix_VD.t()).index_fill(1, torch.tensor(unseen), -torch.inf)
    expected = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    (other,) = torch.autograd.grad(expected, hidden_ND)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own, other)


def test_a_batch_without_labels_costs_nothing_and_trains_nothing() -> None:
    model = model_of("gemma3", tied=False)
    parameters = VocabularyTraining(model, "new", "all", NEW_IDS).parameters()
    ids_BT, labels_BT, position_ids_BT = batch()
    loss = NextTokenLoss(model)(ids_BT, torch.full_like(labels_BT, IGNORED), position_ids_BT)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in parameters.values())


def test_the_trunk_runs_without_autograd_where_only_output_rows_train() -> None:
    model = model_of("gemma3", tied=False)
    VocabularyTraining(model, "none", "new", NEW_IDS)
    loss = NextTokenLoss(model)
    ids_BT, _, position_ids_BT = batch()
    assert not loss.states(ids_BT, position_ids_BT).requires_grad
    tied = model_of("gemma3", tied=True)
    VocabularyTraining(tied, "none", "new", NEW_IDS)
    assert NextTokenLoss(tied).states(ids_BT, position_ids_BT).requires_grad, "its rows are input rows too"


def test_looking_at_the_loss_leaves_gradients_alone() -> None:
    model = model_of("gemma3", tied=False)
    parameters = VocabularyTraining(model, "new", "all", NEW_IDS).parameters()
    loss = NextTokenLoss(model)
    loss(*batch()).backward()
    before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    with torch.no_grad():
        loss(*batch())
    assert before
    for name, gradient in before.items():
        assert torch.equal(parameters[name].grad, gradient), name  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [False, True])
def test_bf16_is_as_near_to_float32_as_the_naive_loss_in_bf16(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round their logits to bfloat16. Ours sums up a gradient over 200 blocks, and may be no further off."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 10)
    torch.manual_seed(0)
    hidden_ND, matrix_VD = torch.randn(64, 32).bfloat16(), torch.randn(2000, 32).bfloat16()
    labels_N = torch.randint(0, 2000, (64,))

    def found(dtype: torch.dtype, ours: bool) -> tuple[float, list[Tensor]]:
        hidden = hidden_ND.detach().to(dtype, copy=True).requires_grad_()
        matrix = matrix_VD.detach().to(torch.float32 if ours and trained else dtype, copy=True).requires_grad_(trained)
        if not ours:
            loss = F.cross_entropy(F.linear(hidden, matrix).float(), labels_N, reduction="sum")
        elif trained:
            loss = TrainedMatrixLoss.apply(hidden, matrix, labels_N, None, 1.0, Scratch(), False)
        else:
            loss = FrozenMatrixLoss.apply(hidden, None, matrix, labels_N, None, [], Scratch())
        gradients = torch.autograd.grad(loss, [hidden, *([matrix] if trained else [])])
        return loss.item(), [gradient.float() for gradient in gradients]

    value, gradients = found(torch.float32, ours=False)
    _, naive_gradients = found(torch.bfloat16, ours=False)
    our_value, our_gradients = found(torch.bfloat16, ours=True)
    assert abs(our_value - value) < 1e-3 * value
    assert len(our_gradients) == 1 + trained
    for exact, naive, ours in zip(gradients, naive_gradients, our_gradients, strict=True):
        assert (ours - exact).norm() < 1.1 * (naive - exact).norm()


def test_rows_are_handed_out_in_float32_and_keep_their_ids() -> None:
    rows = TrainableRows(torch.randn(10, 3).bfloat16(), torch.tensor([7, 2]))
    assert rows.values.dtype == torch.float32
    assert rows.place is not None
    assert rows.place.tolist() == [-1, -1, 1, -1, -1, -1, -1, 0, -1, -1]


def test_a_head_with_a_bias_is_refused() -> None:
    model = model_of("gemma3", tied=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(tiny.VOCABULARY))
    with pytest.raises(ModelError, match="bias"):
        NextTokenLoss(model)


def test_blocks_of_which_nothing_is_seen_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 10)
    hidden_ND, matrix_VD = torch.randn(5, 4, requires_grad=True), torch.randn(40, 4)
    labels_N = torch.tensor([30, 31, 39, 25, 30])
    unseen = list(range(20))  # the first two blocks, whole
    loss = FrozenMatrixLoss.apply(hidden_ND, torch.empty(0, 4), matrix_VD, labels_N, None, unseen, Scratch())
    loss.backward()
    found, hidden_ND.grad = hidden_ND.grad, None
    expected = F.cross_entropy(hidden_ND @ matrix_VD[20:].t(), labels_N - 20, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, hidden_ND.grad)


def test_a_tied_matrix_has_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup adds to what the loss has left: no second V × D gradient is made."""
    model = tiny.gemma3(True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    training = VocabularyTraining(model, "all", "all", [])
    filled = []
    true_take = rows.take_gradient

    def take(parameter: torch.Tensor) -> tuple[torch.Tensor, bool]:
        taken = true_take(parameter)
        filled.append(taken[1])
        return taken

    monkeypatch.setattr(rows, "take_gradient", take)  # the lookup's, not the loss's
    loss = NextTokenLoss(model)
    ids = torch.randint(3, 600, (3, 2, 9))
    for ids_BT in ids:
        loss(ids_BT, ids_BT, torch.arange(9).expand(2, 9), 0.5).backward()
    assert filled == [True, True, True]
    values = training.parameters()["rows"]
    found, values.grad = values.grad, None
    for ids_BT in ids:
        states = model.base_model(input_ids=ids_BT, position_ids=torch.arange(9).expand(2, 9)).last_hidden_state
        logits = F.linear(states, values)
        (0.5 * F.cross_entropy(logits.flatten(0, 1), ids_BT.flatten(), reduction="sum")).backward()
    torch.testing.assert_close(found, values.grad, rtol=1e-4, atol=1e-5)
