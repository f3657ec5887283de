"""What must hold between the values of `data`."""

from datetime import date

from dpo_dist.config.ranges import check_range
from dpo_dist.config.schema import DataConfig, DataFormat, Ranked, SourceConfig
from dpo_dist.errors import ConfigError


def check_data(data: DataConfig) -> None:
    """Accept the sources and their limits, or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if not data.train:
        raise ConfigError(
            "there is nothing to train on",
            where="data.train",
            got="an empty list",
            expected="at least one source",
            remedy="set data.train=[pairs.jsonl], or choose a preset with data=...",
        )
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for index, source in enumerate(sources):
            _check_source(f"{key}[{index}]", source)
            if key == "data.eval" and source.weight != SourceConfig.weight:
                raise ConfigError(
                    "a weight has no effect on data that is evaluated: every pair counts once",
                    where=f"{key}[{index}].weight",
                    got=f"{source.weight:g}",
                    remedy="leave it out, or set limit",
                )
    check_range("data.max_length", data.max_length, at_least=2)
    check_range("data.max_prompt_length", data.max_prompt_length, at_least=1)
    check_range("data.processes", data.processes, at_least=1)
    check_range("data.max_bad_share", data.max_bad_share, at_least=0, at_most=1)
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        raise ConfigError(
            "the longest prompt leaves no room for a response",
            where="data.max_prompt_length, data.max_length",
            got=f"{data.max_prompt_length}, {data.max_length}",
            expected="max_prompt_length < max_length",
            remedy="raise data.max_length or lower data.max_prompt_length",
        )
    _check_template_date(data)
    _check_ranked(data)


def _check_template_date(data: DataConfig) -> None:
    try:
        date.fromisoformat(data.template_date)
    except ValueError as fault:
        raise ConfigError(
            "data.template_date is not a date",
            where="data.template_date",
            got=data.template_date,
            expected=f"YYYY-MM-DD, such as {DataConfig.template_date}",
            remedy=f"write data.template_date={DataConfig.template_date}; other days likewise",
        ) from fault


def _check_ranked(data: DataConfig) -> None:
    formats = {source.format for source in [*data.train, *data.eval]}
    if data.ranked is not Ranked.whole and formats.isdisjoint({DataFormat.auto, DataFormat.ranked}):
        raise ConfigError(
            "data.ranked has no effect: no source holds rankings",
            where="data.ranked, data.train",
            got=f"{data.ranked}; formats {', '.join(sorted(formats))}",
            expected="a source of format ranked or auto",
            remedy="set data.ranked=whole, or leave out the format of the source that holds rankings",
        )


def _check_source(where: str, source: SourceConfig) -> None:
    check_range(f"{where}.weight", source.weight, above=0)
    check_range(f"{where}.limit", source.limit, at_least=1)
