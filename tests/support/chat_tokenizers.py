"""Small tokenizers with the real chat templates of model families, as TRL has them, and with two own ones."""

from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import _byte_level

ASSETS = Path(__file__).parents[1] / "assets" / "chat_templates"
_TRL = Path(trl.__file__).parent / "chat_templates"
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_LLAMA = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
]
_HARMONY = [
    *("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|message|>"),
    *("<|end|>", "<|channel|>", "<|call|>", "<|return|>", "<|constrain|>"),
]
_DEEPSEEK = [
    f"<\uff5c{name.replace(' ', chr(0x2581))}\uff5c>"
    for name in (
        *("begin of sentence", "end of sentence", "User", "Assistant", "tool calls begin", "tool call begin"),
        *("tool sep", "tool call end", "tool calls end", "tool outputs begin", "tool output begin"),
        *("tool output end", "tool outputs end"),
    )
]
_GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
_PHI = ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_MISTRAL = [
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
_COHERE = [
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
]
# Special tokens, further added tokens, BOS and EOS of each template.
_FAMILIES: dict[str, tuple[list[str], list[str], str | None, str]] = {
    "qwen2_5": (_CHATML, _TAGS[2:], None, "<|im_end|>"),
    "qwen3": (_CHATML, _TAGS, None, "<|im_end|>"),
    "qwen3_instruct_2507": (_CHATML, _TAGS, None, "<|im_end|>"),
    "qwen3_5_nothink_training": (_CHATML, _TAGS, None, "<|im_end|>"),
    "qwen3_6": (_CHATML, _TAGS, None, "<|im_end|>"),
    "llama3_1": (_LLAMA, [], _LLAMA[0], "<|eot_id|>"),
    "gemma3": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n"], "<bos>", "<eos>"),
    "gptoss": (_HARMONY, [], _HARMONY[0], "<|return|>"),
    "deepseekv3": (_DEEPSEEK, _TAGS[:2], *_DEEPSEEK[:2]),
    "deepseek_r1_distill": (_DEEPSEEK, _TAGS[:2], *_DEEPSEEK[:2]),
    "phi3": (_PHI, [], "<s>", "<|endoftext|>"),
    "glm4moe": (_GLM, _TAGS, None, "<|endoftext|>"),
    "nemotron_3_nano": (_CHATML, _TAGS, None, "<|im_end|>"),
    "mistral": (_MISTRAL, [], "<s>", "</s>"),
    "smollm3": (_CHATML, _TAGS[:4], None, "<|im_end|>"),
    "cohere2": (_COHERE, [], _COHERE[0], _COHERE[2]),
    "qwen3_5_think": (_CHATML, _TAGS, None, "<|im_end|>"),
    "llava_next": (_MISTRAL[:4], [], "<s>", "</s>"),
    "idefics3": (["<|begin_of_text|>", "<end_of_utterance>"], [], "<|begin_of_text|>", "<end_of_utterance>"),
    "smolvlm": (["<|im_start|>", "<end_of_utterance>"], [], "<|im_start|>", "<end_of_utterance>"),
}
FAMILIES = sorted(_FAMILIES)


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the special tokens and the chat template of a model family."""
    special, added, bos, eos = _FAMILIES[family]
    own = ASSETS / f"{family}.jinja"
    template = own if own.is_file() else _TRL / f"{family}.jinja"
    backend = _byte_level(special)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=template.read_text(),
    )
