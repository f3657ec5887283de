"""The local cache of the Hugging Face Hub, looked at without a request."""

from pathlib import Path


def is_absent_offline(kind: str, name: str) -> bool:
    """Return whether the Hub is switched off (HF_HUB_OFFLINE) and its cache has nothing of a repository.

    Args:
        kind: `model` or `dataset`.
        name: of the repository.
    """
    from huggingface_hub import constants  # noqa: PLC0415  (a local source needs no Hub)

    if not constants.HF_HUB_OFFLINE:
        return False
    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return not any(snapshots.glob("*"))
