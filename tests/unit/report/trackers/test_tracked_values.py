"""Names and order of values that leave for W&B."""

from dpo_dist.insight.metrics.names import last_and_best, order_of, order_of_sent, wandb_names


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


def test_the_evaluation_before_the_first_step_is_not_the_best() -> None:
    rows = [{"step": 0, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 8, "eval_loss": 0.8}]
    assert last_and_best(rows) == {"eval/loss": 0.8, "best/eval/loss": 0.7}
