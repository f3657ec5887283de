"""Model folders with code of their own, which computes what no architecture of transformers does."""

import json
from pathlib import Path

# What happens to the hidden states of Qwen2, [rows, tokens, hidden], and to its logits.
HIDDEN = {
    "plain": "hidden",
    "state": "hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]",  # of the token before
    "rows": "(hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]) * len(hidden)",
    "future": "hidden + hidden.mean(1, keepdim=True)",
    "broken": "hidden[:, :0]",
    "refusing": "hidden",
    "dropout": "torch.nn.functional.dropout(hidden, 0.1, self.training)",
    "noise": "torch.nn.functional.dropout(hidden, 0.1, training=True)",
}
CODE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnModel(Qwen2Model):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.refuses = False
        self.layers[-1].mlp.act_fn.register_forward_pre_hook(self.check)

    def check(self, module, inputs):
        if self.refuses:
            raise RuntimeError("this layer computes rows")

    def forward(self, *args, **kwargs):
        self.refuses = {refuses} and "packed" in kwargs
        outputs = super().forward(*args, **kwargs)
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = {hidden}
        return outputs

class Own(Qwen2ForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * {scale}
        return outputs
"""


def ship_code(folder: Path, hidden: str = "plain", scale: float = 1.0) -> Path:
    """Let config.json of a Qwen2 model name code that changes hidden states (of `HIDDEN`) and logits.

    `refusing`: a layer raises an error in its middle if it is packed.
    """
    code = CODE.format(hidden=HIDDEN[hidden], scale=scale, refuses=hidden == "refusing")
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "own"}))
    return folder
