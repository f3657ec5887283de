"""Whether the adapter that a policy starts from belongs to its base; imports no torch."""

from pathlib import Path

from safetensors import safe_open

from dpo_dist.config.schema import ModelConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from dpo_dist.model.folder import read_model_json, weight_files


def base_notes(config: ModelConfig, start: Path | None) -> list[str]:
    """Return a warning if the adapter to start from names another base than `model.path`.

    Args:
        config: of the model.
        start: from `adapter_files.start_folder`.
    """
    if start is None or not (named := other_base(start, config)):
        return []
    return [
        f"warning: the adapter of model.adapter.path was trained on {named}, model.path is {config.path}; on "
        "other weights than its own an adapter is noise"
    ]


def other_base(adapter: Path, config: ModelConfig) -> str:
    """Return the base that an adapter folder names, if it is another than `model.path`; else "".

    Only the last parts of both names are compared: folders are copied, and files have no other trace.
    """
    named, local = _named_base(adapter), Path(config.path).expanduser()
    own = local.resolve().name if local.is_dir() else local.name
    return "" if not named.strip() or Path(named).name.lower() == own.lower() else named


def check_sizes(base: Path, start: Path) -> None:
    """Check that the matrices of an adapter have the sizes of its base's weights; reads no weights.

    Weights of another name in the files of the base are compared when the model is loaded.

    Args:
        base: a local model folder.
        start: from `adapter_files.start_folder`.

    Raises:
        ConfigError: they have other sizes.
    """
    with safe_open(start / ADAPTER_WEIGHTS, "np") as content:
        names = list(content.keys())
        shapes = {name.removeprefix(PEFT_PREFIX): content.get_slice(name).get_shape() for name in names}
    for file in (file for file in weight_files(base) if file.suffix == ".safetensors"):
        with safe_open(file, "np") as content:
            for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                layer = name.removesuffix(".weight")
                down, up = shapes.get(f"{layer}.lora_A.weight"), shapes.get(f"{layer}.lora_B.weight")
                own = content.get_slice(name).get_shape() if down and up else []
                if down and up and sorted(own) != sorted((up[0], down[1])):
                    raise _other_sizes(base, start, f"{name} of {own}", [up[0], down[1]])


def _other_sizes(base: Path, start: Path, own: str, wanted: list[int]) -> ConfigError:
    named = _named_base(start)
    return ConfigError(
        "the adapter belongs to a model of other sizes",
        where="model.path, model.adapter.path",
        got=f"{own} in {base}",
        expected=f"{wanted}, as in {start}",
        remedy=f"set model.path to the base of the adapter{f', {named}' if named else ''}",
    )


def _named_base(start: Path) -> str:
    named = read_model_json(start / ADAPTER_CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""
