"""`--check` of verbs that generate responses: read the first records, and models without their weights."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.counts import counts_in_one_line
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.remedies import Remedy
from dpo_dist.model.files.folder import description_folder
from dpo_dist.model.files.load import check_contents_at_hand
from dpo_dist.tools.sampling.records import as_user_message
from dpo_dist.tools.sampling.respond import find_files, open_responder, usable_prompt
from dpo_dist.tools.sampling.served import open_server
from dpo_dist.tools.sampling.settings import Sampling


def check_model(
    path: str,
    config: RunConfig,
    sampling: Sampling,
    records: Sequence[PreferenceRecord],
    say: Callable[[str], None],
    key: str,
    name: str = "",
) -> None:
    """Check a model without its weights, and that some record can be its prompt; print the result.

    A server that should generate by it, under `name` (default: the path), gets a harmless request, unless
    the model is served only later, by `sampling.endpoint.reload`.
    """
    model, data, endpoint = config.model, config.data, config.sampling.endpoint
    source = find_files(path, model, key, description_folder)
    responder = open_responder(replace(source, name=name or path), model, data)
    if endpoint.url is not None and endpoint.reload is None:
        server = open_server(endpoint, responder)
        responder = server.responder
        say(f"served as {server}")
    ends = responder.tokenizer.convert_ids_to_tokens(sorted(responder.stop_ids))
    check_contents_at_hand(responder.source.folder, model, key)
    folder = responder.source.adapter or responder.source.folder
    say(f"{folder}, vocabulary of {len(responder.tokenizer):,}, a response ends with {' or '.join(ends)}")
    asked = [as_user_message(record, data) for record in records]
    prompts = [usable_prompt(record, responder, sampling) for record in asked]
    dropped = Counter(prompt for prompt in prompts if isinstance(prompt, str))
    if dropped.total() == len(prompts):
        remedy = Remedy("correct the records, or the keys of data; docs/data.md explains the reasons")
        if "too_long_for_the_model" in dropped and responder.longest is not None:
            # Tokens that the model can write after each record that it can be asked.
            least = [
                usable_prompt(as_user_message(record, data), responder, Sampling(1)) for record in records
            ]
            tokens = [len(prompt.prompt_ids) for prompt in least if not isinstance(prompt, str)]
            if room := responder.longest - max(tokens, default=responder.longest):
                remedy = Remedy.to_set(f"sampling.max_new_tokens={room}")
                remedy += f": the model has {responder.longest} tokens in all"
        raise DataError(
            "none of the first records can be used",
            where=key,
            got=f"{path}: {counts_in_one_line(dropped)}",
            remedy=remedy,
        )
    if dropped:
        say(f"  first records that the model cannot be asked: {counts_in_one_line(dropped)}")
