"""Hold a conversation with a model: its chat template, and transformers' generation, token by token."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from dpo_dist.data import IMAGE, ImageFile, Message, Origin, PreferenceRecord, UnusableRecordError
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.streams import print_result, printable_lines
from dpo_dist.foundation.text import pluralize
from dpo_dist.kit import (
    Dtype,
    ImagesConfig,
    NotFiniteError,
    RunConfig,
    RunHistory,
    WrongGenerationError,
    can_mix_lengths,
    checkpoint_as_model,
    find_files,
    has_products,
    image_inputs,
    is_checkpoint,
    short_name,
)
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.sampling.respond import (
    Responder,
    not_finite,
    open_responder,
    usable_prompt,
    wrong_generation,
)
from dpo_dist.tools.sampling.settings import LEAST_ROOM, Sampling

Say = Callable[[str], None]


class _Printer(TextStreamer):  # type: ignore[misc]
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print_result(printable_lines(text) + "\n" * stream_end)


@dataclass(eq=False)
class Conversation:
    """A model with the turns so far, and the images of all of them.

    `sampling` overrides the model's generation_config. If `max_new_tokens` is None, that of
    generation_config counts, or else 512, and less where the model's context ends before.
    """

    name: str
    responder: Responder
    causal_lm: Any
    say: Say
    max_new_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: tuple[Message, ...] = ()
    images: tuple[ImageFile, ...] = ()

    def begin(self) -> None:
        """Begin a new conversation."""
        self.turns = ()
        self.images = ()

    def answer(self, question: str, images: Sequence[ImageFile]) -> None:
        """Print the answer to a question after `images` as it comes, and keep both turns.

        Raises ConfigError if the conversation with the answer does not fit.
        """
        responder = self.responder
        causal_lm = self.causal_lm
        usual = causal_lm.generation_config.max_new_tokens or 512
        limit = Sampling(self.max_new_tokens or usual, is_default=self.max_new_tokens is None)
        turns = (*self.turns, Message("user", IMAGE * len(images) + question))
        record = PreferenceRecord(turns, (), Origin(self.name, 1), images=(*self.images, *images))
        prompt = usable_prompt(record, responder, limit)
        if isinstance(prompt, str):
            raise ConfigError(
                "the model cannot be asked this",
                where=self.name,
                got=prompt,
                expected=f"a chat template; {pluralize(self.max_new_tokens or LEAST_ROOM, 'more token')} "
                f"within the model's {responder.longest}",
                remedy="start again, lower --max-new-tokens, or put chat_template.jinja into its folder",
            )
        tokens = len(prompt.prompt_ids)
        ids = torch.tensor([prompt.prompt_ids.tolist()], device=causal_lm.device)
        stop_ids = sorted(responder.stop_ids)
        inputs = responder.images(prompt)
        try:
            can_mix_lengths(causal_lm, causal_lm.device, stop_ids[0], inputs)
        except WrongGenerationError as fault:
            raise wrong_generation(self.name, fault) from None
        except NotFiniteError:
            raise not_finite(self.name) from None
        output = causal_lm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **image_inputs(causal_lm, ids, inputs),
            streamer=_Printer(responder.tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=limit.room(tokens, responder.longest),
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            **self.sampling,
        )
        answer = output[0, ids.shape[1] :]
        if tokens + len(answer) == responder.longest and int(answer[-1]) not in responder.stop_ids:
            self.say(f"cut at the end of the model's {responder.longest} tokens; /new starts again")
        text = str(responder.tokenizer.decode(answer, skip_special_tokens=True))
        self.turns = (*turns, Message("assistant", text))
        self.images = record.images

    def open_images(self, paths: str) -> list[ImageFile]:
        """Return the images at `paths`, as written in a shell; `say` in one line why one is left out."""
        processor = self.responder.processor
        if processor is None:
            self.say(f"{self.name} cannot read images")
            return []
        try:
            names = shlex.split(paths)
        except ValueError:  # a quote that is not closed
            names = [paths]
        images = []
        for path in names:
            try:
                name = str(Path(path).expanduser().absolute())
                content = ImageFile(name=name, folders=("/",)).read()
                processor.expanded(content)
            except (UnusableRecordError, RuntimeError) as fault:  # RuntimeError: an unknown home folder
                self.say(f"{path}: {getattr(fault, 'detail', fault)}")
            else:
                images.append(ImageFile(content))
        return images


def open_conversation(location: str, say: Say, trusts_code: bool = False) -> Conversation:
    """Load the model at `location`, as `locate_model` returns it, with the configuration of its run, if any.

    `trusts_code`: whether Python code in the model's folder may run.
    """
    folder = Path(location).expanduser()
    above = map(ComparisonFolder, folder.absolute().parents[:2])
    run = next((run for run in above if folder.is_dir() and run.state.is_file()), None)
    config = RunConfig() if run is None else RunHistory(run).config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulated = device.type == "cpu" and not has_products(config.model.dtype)
    dtype = Dtype.fp32 if emulated else config.model.dtype
    # Only the user can allow code, not a run's configuration; the run's template is saved with its model.
    model = replace(config.model, trust_remote_code=trusts_code, dtype=dtype)
    data = replace(config.data.without_limits(), chat_template=None)
    name = short_name(location)
    if is_checkpoint(folder) and run is not None:
        location = str(checkpoint_as_model(folder, run.comparison_models, say, trusts_code))
    source = find_files(location, model, "RUN")
    source.check(None if run is None else Path(config.reference.store))
    models = [model]
    if model.images is None and any(source.folder.glob("*processor_config.json")):
        models.insert(0, replace(model, images=ImagesConfig()))  # it reads images, also if trained on text
    for choice in models:
        try:
            return Conversation(name, open_responder(source, choice, data), source.load(choice, device), say)
        except ConfigError as error:
            if choice is models[-1]:
                raise
            say(f"{name} cannot read images: {error.message}: {error.got}")
    raise AssertionError(models)
