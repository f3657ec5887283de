"""A reward model as judge: a sequence classification model with one output, by its own chat template."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from dpo_dist.config.schema import ModelConfig
from dpo_dist.data.build import tokenizer_digest
from dpo_dist.data.records import Dialogue, Message, PreferenceRecord, UnusableRecordError
from dpo_dist.data.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.files import text_digest
from dpo_dist.generation.judges.judge import Judgement, Question
from dpo_dist.model.folder import description_folder, model_folder
from dpo_dist.model.load import TORCH_DTYPES, check_all_weights_read, load_config, load_tokenizer
from dpo_dist.reference.digest import digest_model

KEY = "pairs.reward_model"


class RewardModel:
    """Scores each response by the model's output for the whole conversation."""

    def __init__(self, name: str, config: ModelConfig, device: torch.device, batch_tokens: int = 32768):
        folder = model_folder(name, None, KEY)
        self._tokenizer = load_tokenizer(folder, config, KEY)
        self._model = _load(folder, config, device)
        self._budget = batch_tokens
        self._padding = self._model.config.get_text_config().pad_token_id
        self._longest = getattr(self._model.config, "max_position_embeddings", None) or math.inf

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """Return the model's scores; None for a conversation too long for it, or rejected by its template."""
        encoded = [self._encoded(each.record, response) for each in questions for response in each.responses]
        scores = iter(self._scores(encoded))
        judgements = []
        for question in questions:
            own = [next(scores) for _ in question.responses]
            if not all(score is None or math.isfinite(score) for score in own):
                raise ConfigError(
                    "the reward model computes a score that is not finite",
                    where=f"{KEY} at the prompt of {question.record.origin}",
                    got="NaN or infinity",
                    remedy="check its weights, or set model.dtype=fp32; finished parts are kept",
                )
            judgements.append(Judgement(own, Counter({"not_scored": own.count(None)})))
        return judgements

    def _encoded(self, record: PreferenceRecord, response: str) -> list[int] | None:
        """Return the conversation by the model's template; without one, prompt and response as two texts.

        None: the template rejects the conversation.
        """
        facts = tokenizer_facts(self._tokenizer, with_tools=bool(record.tools))
        prompt, chat = record.prompt, facts.chat
        messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if chat is None:
            turns = "\n\n".join(turn.content for turn in messages)
            if isinstance(prompt, Dialogue):
                turns = prompt.text
            ids: list[int] = self._tokenizer(turns, response, split_special_tokens=True)["input_ids"]
            return ids
        tools = {"tools": list(record.tools)} if record.tools else {}
        whole = tuple(chat.turn(turn) for turn in (*messages, Message("assistant", response)))
        try:
            rendered = chat.render(whole, chat.data({**record.template_arguments, **tools}))
        except UnusableRecordError:
            return None
        return facts.with_prefix(facts.encoder.encode([rendered])[0])[0]

    @torch.inference_mode()
    def _scores(self, encoded: Sequence[list[int] | None]) -> list[float | None]:
        scores: list[float | None] = [None] * len(encoded)
        rows = {at: torch.tensor(ids) for at, ids in enumerate(encoded) if ids and len(ids) <= self._longest}
        order = sorted(rows, key=lambda at: -len(rows[at]))
        while order:
            # The score is read at the last token that is no padding: without such a token, one row at a time.
            size = 1 if self._padding is None else max(1, self._budget // len(rows[order[0]]))
            batch, order = order[:size], order[size:]
            padded = pad_sequence([rows[at] for at in batch], True, self._padding or 0)
            mask = pad_sequence([torch.ones_like(rows[at]) for at in batch], True)
            device = self._model.device
            logits = self._model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
            for at, score in zip(batch, logits.float()[:, 0].tolist(), strict=True):
                scores[at] = score
        return scores


def check_reward_model(name: str, config: ModelConfig) -> str:
    """Check a reward model without its weights; return its folder and architecture."""
    folder = description_folder(name, None, KEY)
    model_config = load_config(folder, config, KEY)
    if model_config.num_labels != 1:
        raise _no_reward_model(f"{folder} with {model_config.num_labels} outputs")
    load_tokenizer(folder, config, KEY)
    return f"{folder}, {model_config.model_type}"


def describe_reward_model(name: str, config: ModelConfig, store: Path) -> dict[str, Any]:
    """Return name, digest of the files and precision of a reward model, for provenance."""
    check_reward_model(name, config)
    folder = model_folder(name, None, KEY)
    files = digest_model(folder, store, remote_code=config.trust_remote_code)
    digest = text_digest(f"{files.digest} {tokenizer_digest(folder)}")
    return {"kind": "reward_model", "name": name, "digest": digest, "dtype": str(config.dtype)}


def _load(folder: Path, config: ModelConfig, device: torch.device) -> Any:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=TORCH_DTYPES[config.dtype],
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # an architecture's constructor can raise anything
        raise _no_reward_model(f"{folder}: {first_line(error)}") from error
    outputs, missing = model.config.num_labels, sorted(report["missing_keys"])
    if outputs != 1 or missing:
        fault = f"without {', '.join(missing[:3])}" if missing else f"with {outputs} outputs"
        raise _no_reward_model(f"{folder} {fault}")
    check_all_weights_read(model, sorted(report["unexpected_keys"]), folder, KEY)
    return model.to(device).eval()


def _no_reward_model(got: str) -> ConfigError:
    return ConfigError(
        "the model is no reward model that can be loaded",
        where=KEY,
        got=got,
        expected="a model of AutoModelForSequenceClassification with one output",
        remedy="name a reward model, or set pairs.function for another kind of score",
    )
