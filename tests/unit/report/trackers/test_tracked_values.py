"""Names, order and texts that leave for W&B."""

import pytest

from dpo_dist.report.trackers.tracked_values import order_of, order_of_sent, wandb_names, without_secrets

ENVIRONMENT = {"OPENAI_API_KEY": "of-my-endpoint", "HF_TOKEN": "short", "HOME": "/home/somebody"}


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("https://me:pass@host:8000/v1", "https://***@host:8000/v1"),
        ("http://host/v1?api_key=abc&model=m", "http://host/v1?api_key=***&model=m"),
        ("s3://bucket/data?X-Amz-Signature=abc#part", "s3://bucket/data?X-Amz-Signature=***#part"),
        ("hf_" + "a1" * 17, "***"),
        ("Bearer of-my-endpoint", "Bearer ***"),
        ("/home/somebody/data?monkey=3", "/home/somebody/data?monkey=3"),
        ("org/sk-model a short text", "org/sk-model a short text"),
        ("OPENAI_API_KEY", "OPENAI_API_KEY"),
    ],
)
def test_a_secret_in_a_text_is_not_sent(text: str, sent: str) -> None:
    found = without_secrets({"values": [text, 1, None, True]}, ENVIRONMENT)
    assert found == {"values": [sent, 1, None, True]}


def test_an_evaluation_comes_after_the_row_of_its_step() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "eval_loss": 0.7},
        {"step": 2, "loss": 0.6},
        {"step": 2, "eval_loss": 0.6},
        {"step": 3, "loss": 0.6},
    ]
    orders = [order_of(row) for row in rows]
    assert orders == sorted(orders)
    assert [order_of_sent(wandb_names(row)) for row in rows] == orders
    assert order_of_sent({}) < orders[0]
