"""A teacher's sparse rows, and the head's gradient towards them, beside whole distributions in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_dist.objective import token_logps as head
from dpo_dist.objective.distillation import SparseRows, WholeDistributions, WholeTargets, generalized_jsd
from dpo_dist.objective.token_logps import (
    LogitChange,
    changed_logits,
    logps_of_logits,
    rows_of_logits,
    teacher_rows,
    token_logps,
)

POSITIONS, HIDDEN, VOCABULARY = 37, 24, 101
CHANGES = {
    "plain": LogitChange(),
    "scaled": LogitChange(0.5),
    "capped": LogitChange(1.5, softcap=3.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._CHUNK_BYTES, "cpu", 4 * VOCABULARY * 8)


def drawn(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "hidden": torch.randn(POSITIONS, HIDDEN),
        "weight": torch.randn(VOCABULARY, HIDDEN) / 4,
        "bias": torch.randn(VOCABULARY) / 4,
        "targets": torch.randint(VOCABULARY, (POSITIONS,)),
        "teacher": torch.randn(POSITIONS, VOCABULARY) * 2,
        "slopes": torch.randn(2, POSITIONS),
        "states": torch.randn(POSITIONS, HIDDEN + 8),
        "wide": torch.randn(VOCABULARY - 3, HIDDEN + 8) / 2,
    }


def changed(hidden: Tensor, weight: Tensor, bias: Tensor, change: LogitChange) -> Tensor:
    logits = (hidden @ weight.T + bias) * change.scale
    return logits if change.softcap is None else change.softcap * torch.tanh(logits / change.softcap)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_whole_teacher_is_the_dense_cross_entropy(change: LogitChange, temperature: float) -> None:
    """Also beside log-probs with gradients of their own, over several chunks."""
    facts = drawn()
    kept = SparseRows(VOCABULARY, 0, temperature, VOCABULARY)
    rows = rows_of_logits(facts["teacher"], torch.empty(POSITIONS, 0), kept)
    leaves = [facts[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    values = token_logps(*leaves, facts["targets"], change=change, soft=kept.soft_targets(rows))
    (values * facts["slopes"]).sum().backward()

    exact = [facts[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = changed(*exact, change)
    teacher = torch.softmax(facts["teacher"].double() / temperature, -1)
    logps = torch.log_softmax(logits, -1).gather(1, facts["targets"][:, None])[:, 0]
    expected = (teacher * torch.log_softmax(logits / temperature, -1)).sum(1)
    (torch.stack((logps, expected)) * facts["slopes"].double()).sum().backward()
    torch.testing.assert_close(values.double(), torch.stack((logps, expected)), rtol=1e-6, atol=2e-6)
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
    divergence = (teacher * (teacher.log() - torch.log_softmax(logits / temperature, -1))).sum(1)
    torch.testing.assert_close(kept.divergences(rows, values[1]).double(), divergence, rtol=1e-5, atol=1e-5)


def test_existing_logits_give_the_same() -> None:
    facts = drawn()
    kept = SparseRows(5, 4, 1.7, VOCABULARY)
    uniforms = torch.rand(POSITIONS, 4)
    logits = changed(facts["hidden"], facts["weight"], facts["bias"], LogitChange())
    rows = teacher_rows(facts["hidden"], facts["weight"], facts["bias"], uniforms, kept)
    torch.testing.assert_close(rows, rows_of_logits(logits, uniforms, kept))
    soft = kept.soft_targets(rows)
    arguments = facts["targets"], ("entropy", "agreement"), soft
    mine = token_logps(facts["hidden"], facts["weight"], facts["bias"], *arguments[:2], soft=soft)
    torch.testing.assert_close(mine, logps_of_logits(logits, *arguments))
    assert mine[3].all(), "a model agrees with itself"


def gkd(logits: Tensor, teacher: Tensor, mix: float, temperature: float) -> Tensor:
    """Divergences by the definition, of logits [n, ids]."""
    p, q = (torch.softmax(each / temperature, -1) for each in (logits, teacher))
    if mix == 1:
        return (p * (p / q).log()).sum(1)
    m = mix * q + (1 - mix) * p
    return mix * (q * (q / m).log()).sum(1) + (1 - mix) * (p * (p / m).log()).sum(1)


@pytest.mark.parametrize("mix", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_divergences_from_whole_distributions(change: LogitChange, temperature: float, mix: float) -> None:
    """Also beside log-probs with gradients of their own; only ids that both models have are compared."""
    facts = drawn()
    known = VOCABULARY - 7
    kept = WholeDistributions(mix, temperature, known)
    teacher = changed_logits(facts["states"], facts["wide"], None)
    soft = WholeTargets(kept, facts["states"], partial(changed_logits, weight=facts["wide"], bias=None))
    leaves = [facts[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    values = token_logps(*leaves, facts["targets"], ("agreement",), change, soft)
    (values[:2] * facts["slopes"]).sum().backward()

    exact = [facts[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = changed(*exact, change)
    logps = torch.log_softmax(logits, -1).gather(1, facts["targets"][:, None])[:, 0]
    divergences = gkd(logits[:, :known], teacher.double()[:, :known], mix, temperature)
    expected = torch.stack((logps, divergences))
    (expected * facts["slopes"].double()).sum().backward()
    torch.testing.assert_close(values[:2].double(), expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(values[2], (logits.argmax(1) == teacher[:, :known].argmax(1)).float())
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-5)

    own = logits.detach().float().requires_grad_()
    of_logits = logps_of_logits(own, facts["targets"], ("agreement",), soft)
    torch.testing.assert_close(of_logits, values)
    of_logits[1].sum().backward()
    exact_logits = logits.detach().requires_grad_()
    gkd(exact_logits[:, :known], teacher.double()[:, :known], mix, temperature).sum().backward()
    torch.testing.assert_close(own.grad.double(), exact_logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mix", [0.2, 1.0])
def test_a_certain_teacher_has_finite_divergences(mix: float) -> None:
    """Of an id to which bf16 logits leave no probability at all."""
    logits = torch.zeros(2, VOCABULARY, requires_grad=True)
    certain = torch.full((2, VOCABULARY), -torch.inf).index_fill(1, torch.tensor([4]), 3e3)
    kept = WholeDistributions(mix, 1.0, VOCABULARY)
    values, slopes = generalized_jsd(kept.log_softmax(logits), kept.log_softmax(certain), mix)
    assert values.isfinite().all()
    assert slopes.isfinite().all()
    assert values.min() > 0


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_divergences_are_those_of_trl(mix: float) -> None:
    gkd_trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, POSITIONS, VOCABULARY) * 3
    kept = WholeDistributions(mix, 1.3, VOCABULARY)
    by_trl = gkd_trainer.generalized_jsd_loss(
        logits[None], teacher[None], beta=mix, temperature=1.3, reduction="sum"
    )
    mine = generalized_jsd(kept.log_softmax(logits), kept.log_softmax(teacher), mix)[0].sum()
    assert mine.item() == pytest.approx(by_trl.item(), rel=1e-6)


def test_draws_are_unbiased() -> None:
    """The mean over 2,000 seeds is the dense value and gradient, within its standard error."""
    torch.manual_seed(0)
    seeds = 2000
    teacher = torch.randn(1, VOCABULARY) * 2
    student = torch.randn(1, VOCABULARY)
    kept = SparseRows(8, 5, 1.0, VOCABULARY)
    rows = rows_of_logits(teacher.expand(seeds, -1), torch.rand(seeds, 5), kept)
    soft = kept.soft_targets(rows)
    torch.testing.assert_close(soft.shares.sum(1), torch.ones(seeds))
    shares = torch.zeros(seeds, VOCABULARY).scatter_add_(1, soft.ids, soft.shares)
    wanted = torch.softmax(teacher, -1)
    # A drawn token has its share, or none: a variance of at most probability times share.
    error = (wanted[0] * soft.shares[:, -1].mean() / seeds).sqrt()
    assert ((shares.mean(0) - wanted[0]).abs() <= 5 * error).all()
    values = logps_of_logits(student.expand(seeds, -1), torch.zeros(seeds, dtype=torch.int64), (), soft)[1]
    dense = (wanted * torch.log_softmax(student, -1)).sum()
    assert (values.mean() - dense).abs() < 4 * values.std() / seeds**0.5
    # The k largest alone are not: what they miss is far outside of that error.
    truncated = (soft.shares[:, :8] * torch.log_softmax(student, -1)[0, soft.ids[:, :8]]).sum(1).mean()
    assert (truncated - dense).abs() > 40 * values.std() / seeds**0.5


class WithoutSumsOfFloats(TorchDispatchMode):
    """A GPU has no deterministic kernel for cumulative sums of floats (`trainer.deterministic`)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_sum = func in (torch.ops.aten.cumsum.default, torch.ops.aten.cumsum_.default)
        assert not (is_sum and result.is_floating_point())
        return result


def test_draws_are_deterministic_on_gpus() -> None:
    with WithoutSumsOfFloats():
        rows_of_logits(torch.randn(3, VOCABULARY), torch.rand(3, 4), SparseRows(5, 4, 1.0, VOCABULARY))


def test_small_probabilities_are_drawn_as_often_as_they_are_likely() -> None:
    """Of 150,000 equal tokens, one in each of the parts, from the first to the last, at any place in it."""
    tokens = 150_000
    logits = torch.zeros(1, tokens).index_fill(1, torch.tensor([tokens // 2]), 20.0)
    kept = SparseRows(1, 3, 1.0, tokens)
    for uniform in (0.0, 0.25, 1 - 2**-24):
        soft = kept.soft_targets(rows_of_logits(logits, torch.full((1, 3), uniform), kept))
        places = (torch.arange(3) + uniform) / 3 * (tokens - 1)
        expected = places + (places >= tokens // 2)
        assert ((soft.ids[0, 1:] - expected).abs() <= 1).all()
        assert soft.ids.max() < tokens


def test_a_certain_teacher() -> None:
    """Nothing is left to draw: no share, no id outside of the vocabulary, no nan."""
    logits = torch.full((3, VOCABULARY), -1e4)
    logits[:, 7] = 0.0
    kept = SparseRows(2, 3, 1.0, VOCABULARY)
    rows = rows_of_logits(logits, torch.full((3, 3), 0.999999), kept)
    soft = kept.soft_targets(rows)
    assert rows.isfinite().all()
    assert ((soft.ids >= 0) & (soft.ids < VOCABULARY)).all()
    assert soft.shares[:, 0].tolist() == [1.0] * 3
    assert soft.shares[:, 1:].sum() == 0
    assert kept.divergences(rows, torch.zeros(3)).tolist() == [0.0] * 3


def test_ids_that_the_student_lacks_are_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY)
    whole = SparseRows(90, 0, 1.0, 90)
    nothing = torch.empty(4, 0)
    of_known_ids = rows_of_logits(logits[:, :90], nothing, whole)
    torch.testing.assert_close(rows_of_logits(logits, nothing, whole), of_known_ids)
