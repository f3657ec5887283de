"""The files of `pairs` and of its rounds."""

from dpo_dist.kit import PathBelow, RunFolder


class PairsFolder(RunFolder):
    """The run directory of `pairs`, or of a round."""

    pairs = PathBelow("pairs")
    pairs_file = PathBelow("pairs/pairs.jsonl")
    pairs_samples = PathBelow("pairs/samples.jsonl")
    pairs_parts = PathBelow("pairs/parts")
    """Finished parts of the work, by the digest of the settings that define them."""
    pairs_judgements = PathBelow("pairs/judgements.jsonl")
    pairs_agreement = PathBelow("pairs/agreement.json")
    rounds = PathBelow("rounds")
    rounds_config = PathBelow("rounds/config.yaml")
    """The configuration that the rounds share."""
    rounds_summary = PathBelow("rounds/rounds.json")

    def round(self, number: int) -> "PairsFolder":
        """Return the folder of a round, which is the run directory of its sampling."""
        return PairsFolder(self.rounds / str(number))

    round_result = PathBelow("round.json")
    """The finished stages of a round, in its folder."""

    @property
    def training(self) -> RunFolder:
        """The run directory of a round's training, in the round's folder."""
        return RunFolder(self.path / "train")

    policy = PathBelow("policy")
    """The policy after a round that trains an adapter, merged into its base; in the round's folder."""
