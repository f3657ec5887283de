"""A user's own loss is called as documented, and tried before anything depends on it."""

from pathlib import Path

import pytest
import torch

from dpo_dist.config.losses import LossConfig, LossKind, LossTermConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import check_custom_loss, preference_loss
from tests.support.own_loss import OWN

POLICY = PairLogps(*torch.tensor([[-10.0, -12.0], [-20.0, -9.0], [4.0, 6.0], [5.0, 2.0]]))
REFERENCE = PairLogps(*torch.tensor([[-12.0, -12.0], [-18.0, -8.0], [4.0, 6.0], [5.0, 2.0]]))


@pytest.mark.parametrize("reference_free", [False, True])
def test_a_custom_function_with_the_formula_of_a_kind_has_its_losses(reference_free: bool) -> None:
    reference = None if reference_free else REFERENCE
    own = LossConfig(LossKind.custom, function=OWN, reference_free=reference_free)
    builtin = LossConfig(LossKind.hinge, reference_free=reference_free)
    losses = preference_loss(POLICY, reference, own)
    assert losses.tolist() == preference_loss(POLICY, reference, builtin).tolist()
    assert str(check_custom_loss(own)).startswith(f"custom loss {OWN} from ")


def test_a_function_can_be_a_term_of_a_sum() -> None:
    terms = [LossTermConfig(LossKind.custom, 2.0), LossTermConfig(LossKind.sft, 0.5)]
    own = LossConfig(terms=terms, function=OWN)
    check_custom_loss(own)
    builtin = LossConfig(terms=[LossTermConfig(LossKind.hinge, 2.0), terms[1]])
    assert preference_loss(POLICY, REFERENCE, own).tolist() == pytest.approx(
        preference_loss(POLICY, REFERENCE, builtin).tolist()
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return (policy.chosen - reference.chosen).mean()", "one loss per pair"),
        ("return [1.0, 2.0, 3.0]", "one loss per pair"),
        ("return torch.log(policy.chosen)", "not finite"),
        ("return policy.chosen.detach()", "without a gradient"),
        ("return policy.chosen.detach() * torch.ones((), requires_grad=True)", "without a gradient"),
        ("return policy.chosen + 0j", "not finite real"),
        ("raise SystemExit(0)", "SystemExit"),
        ("policy.chosen.register_hook(lambda _: 1 / 0)\n    return policy.chosen * 1", "ZeroDivisionError"),
        ("return torch.sqrt(policy.chosen - policy.chosen)", "gradients that are not finite"),
        ("return policy.chosen - policy.chosen.mean()", "does not depend on the other pairs"),
        ("return policy.chosen - config.gamma", "AttributeError"),
    ],
)
def test_an_unusable_function_is_an_error_with_a_reason(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find_function.cache_clear()
    source = f"import torch\n\n\ndef mine(policy, reference, config):\n    {body}\n"
    (tmp_path / "own_refused.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        check_custom_loss(LossConfig(LossKind.custom, function="own_refused:mine"))
    assert said in caught.value.block()
    assert caught.value.remedy
