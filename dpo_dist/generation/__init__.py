"""Responses of models to prompts, their scores by a judge, and the pairs made of them."""
