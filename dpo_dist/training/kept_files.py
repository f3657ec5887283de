"""Files of the inputs that become part of the result, read at the start of a run.

They may be deleted or replaced before its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.world import World
from dpo_dist.model.adapter_files import untrained_parts
from dpo_dist.model.adapter_weights import AdapterWeights
from dpo_dist.model.description import read_description
from dpo_dist.model.save import read_tokenizer
from dpo_dist.training.data_setup import Inputs


@dataclass(frozen=True)
class KeptFiles:
    """Contents of files, in the host memory of rank 0; other ranks have none.

    Attributes:
        adapters: that are part of the policy beside the trained one, with coefficients.
        tokenizer: files of the tokenizer by name; None: transformers writes new ones.
        description: files from `read_description` of the base; None: transformers writes new ones.
    """

    adapters: Sequence[tuple[float, AdapterWeights]] = ()
    tokenizer: Mapping[str, bytes] | None = None
    description: Mapping[str, bytes] | None = None


def keep_files(config: RunConfig, inputs: Inputs, world: World) -> KeptFiles:
    """Read the files after the policy is loaded; collective.

    Raises:
        ConfigError: an adapter cannot be read.
    """

    def read() -> KeptFiles:
        if not world.is_main:
            return KeptFiles()
        initial = RunFolder.of(config).initial_adapter
        parts = untrained_parts(config.model.adapter, inputs.policy_files.adapter, initial)
        adapters = [(share, AdapterWeights.of_folder(folder).in_memory()) for share, folder in parts]
        is_chosen = config.data.chat_template is not None
        tokenizer = None if is_chosen else read_tokenizer(inputs.tokenizer_files) or None
        return KeptFiles(adapters, tokenizer, read_description(inputs.policy_files.folder))

    return world.together(read)
