"""Trackers: W&B, TensorBoard, MLflow."""
