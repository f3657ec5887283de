"""Hold a conversation with a model: its chat template, and transformers' generation, token by token."""

import contextlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from dpo_dist.config.schema import ImagesConfig
from dpo_dist.data import IMAGE, DataConfig, ImageFile, Message, Origin, PreferenceRecord, UnusableRecordError
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.streams import print_result, printable_lines
from dpo_dist.foundation.text import pluralize
from dpo_dist.kit import (
    UNSET,
    Dtype,
    ModelConfig,
    ModelSource,
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
from dpo_dist.model.lora import adapter_off
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.sampling.respond import (
    Responder,
    not_finite,
    open_responder,
    usable_prompt,
    wrong_generation,
)
from dpo_dist.tools.sampling.settings import LEAST_ROOM, Sampling

BASE = "base"
"""Names, in place of a path, the base of an adapter or the model from which a run started."""


class _Printer(TextStreamer):  # type: ignore[misc]
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print_result(printable_lines(text) + "\n" * stream_end)


@dataclass(eq=False)
class Speaker:
    """A model with its conversation so far; `without_adapter`: its adapter is off."""

    name: str
    responder: Responder
    causal_lm: Any
    model: ModelConfig
    store: Path | None = None  # with cached digests of files
    without_adapter: bool = False
    turns: tuple[Message, ...] = ()
    images: tuple[ImageFile, ...] = ()  # of all turns

    def answer(
        self,
        question: str,
        images: Sequence[ImageFile],
        max_new_tokens: int | None,
        sampling: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Print the answer to a question after `images` as it comes, and keep both turns.

        `sampling` overrides the model's generation_config. If `max_new_tokens` is None, that of
        generation_config counts, or else 512, and less where the model's context ends before. Raises
        ConfigError if the conversation with the answer does not fit.
        """
        responder = self.responder
        causal_lm = self.causal_lm
        usual = causal_lm.generation_config.max_new_tokens or 512
        limit = Sampling(max_new_tokens or usual, is_default=max_new_tokens is None)
        turns = (*self.turns, Message("user", IMAGE * len(images) + question))
        record = PreferenceRecord(turns, (), Origin(self.name, 1), images=(*self.images, *images))
        prompt = usable_prompt(record, responder, limit)
        if isinstance(prompt, str):
            raise ConfigError(
                "the model cannot be asked this",
                where=self.name,
                got=prompt,
                expected=f"a chat template; {pluralize(max_new_tokens or LEAST_ROOM, 'more token')} within "
                f"the model's {responder.longest}",
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
        with adapter_off(causal_lm) if self.without_adapter else contextlib.nullcontext():
            output = causal_lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **image_inputs(causal_lm, ids, inputs),
                streamer=_Printer(responder.tokenizer, skip_prompt=True, skip_special_tokens=True),
                max_new_tokens=limit.room(tokens, responder.longest),
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
                **sampling,
            )
        answer = output[0, ids.shape[1] :]
        if tokens + len(answer) == responder.longest and int(answer[-1]) not in responder.stop_ids:
            say(f"{self.name}: cut at the end of the model's {responder.longest} tokens; /new starts again")
        text = str(responder.tokenizer.decode(answer, skip_special_tokens=True))
        self.turns = (*turns, Message("assistant", text))
        self.images = record.images


def open_images(paths: str, speakers: Sequence[Speaker], say: Callable[[str], None]) -> list[ImageFile]:
    """Return the images at `paths`, as written in a shell; `say` in one line why one is left out."""
    blind = [speaker.name for speaker in speakers if speaker.responder.processor is None]
    try:
        names = shlex.split(paths)
    except ValueError:  # a quote that is not closed
        names = [paths]
    if blind:
        say(f"{' and '.join(blind)} cannot read images")
        return []
    if not names:
        say("/image PATH: name a file")
        return []
    images = []
    for path in names:
        try:
            content = ImageFile(name=str(Path(path).expanduser().absolute()), folders=("/",)).read()
            for speaker in speakers:
                assert speaker.responder.processor is not None
                speaker.responder.processor.expanded(content)
        except (UnusableRecordError, RuntimeError) as fault:  # RuntimeError: an unknown home folder
            say(f"{path}: {getattr(fault, 'detail', fault)}")
        else:
            images.append(ImageFile(content))
    return images


def open_speakers(
    location: str, beside: str | None, say: Callable[[str], None], trusts_code: bool = False
) -> list[Speaker]:
    """Load the model at `location`, as `locate_model` returns it, and the model `beside` it, if any.

    `trusts_code`: whether Python code in the models' folders may run.
    """
    first = _open(location, "RUN", say, trusts_code)
    if beside != BASE:
        return [first] if beside is None else [first, _open(beside, "--beside", say, trusts_code)]
    if first.responder.source.adapter is not None:
        return [first, replace(first, name=BASE, without_adapter=True)]
    if first.model.path == UNSET:
        raise ConfigError(
            "the base of this model is not known",
            where="--beside base",
            got=location,
            expected="a run, its checkpoint or model, or an adapter",
            remedy="name the base: --beside PATH",
        )
    # The base gets the run's tokenizer and template, as its reference did.
    source = find_files(first.model.path, first.model, "model.path")
    source.check_is_base_of(first.responder.source.folder, first.store)
    base = source.load(first.model, _device())
    return [first, replace(first, name=BASE, causal_lm=base)]


def _open(location: str, key: str, say: Callable[[str], None], trusts_code: bool) -> Speaker:
    """Load a model; one in a run's folder gets that run's configuration."""
    folder = Path(location).expanduser()
    above = map(ComparisonFolder, folder.absolute().parents[:2])
    run = next((run for run in above if folder.is_dir() and run.state.is_file()), None)
    config = RunConfig() if run is None else RunHistory(run).config()
    emulated = _device().type == "cpu" and not has_products(config.model.dtype)
    dtype = Dtype.fp32 if emulated else config.model.dtype
    # Only the user can allow code, not a run's configuration; the run's template is saved with its model.
    model = replace(config.model, trust_remote_code=trusts_code, dtype=dtype)
    data = replace(config.data.without_limits(), chat_template=None)
    name = short_name(location)
    if is_checkpoint(folder) and run is not None:
        location = str(checkpoint_as_model(folder, run.comparison_models, say, trusts_code))
    source = find_files(location, model, key)
    store = None if run is None else Path(config.reference.store)
    source.check(store)
    return replace(_loaded(name, source, model, data, say), store=store)


def _loaded(
    name: str, source: ModelSource, model: ModelConfig, data: DataConfig, say: Callable[[str], None]
) -> Speaker:
    """Load a model; it reads images if it can, also if it was trained on text."""
    if model.images is None and any(source.folder.glob("*processor_config.json")):
        try:
            return _loaded(name, source, replace(model, images=ImagesConfig()), data, say)
        except ConfigError as error:
            say(f"{name} cannot read images: {error.message}: {error.got}")
    return Speaker(name, open_responder(source, model, data), source.load(model, _device()), model)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
