"""What servers with the OpenAI API reply: the fields that are read, and nothing else is believed.

Fields may be absent or null where servers leave them out; what they hold has the right type and range.
"""

from typing import Annotated

from pydantic import BaseModel, Field

_Count = Annotated[int, Field(ge=0, lt=2**31)]
# Rounding lifts the log-prob of a certain token a little above 0.
_Logp = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]


class ListedModel(BaseModel):
    """A model that a server lists."""

    id: str
    max_model_len: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Models(BaseModel):
    """The list of models; some servers have none."""

    data: list[ListedModel] = []


class Logprobs(BaseModel):
    """Log-probs of the tokens of a response."""

    token_logprobs: list[_Logp | None] | None = None


class Choice(BaseModel):
    """A response; ids as vLLM reports them."""

    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: list[_Count] | None = None
    prompt_token_ids: list[_Count] | None = None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: _Count | None = None


class CompletionReply(BaseModel):
    """A reply to a prompt."""

    choices: list[Choice]
    usage: Usage | None = None


class MessagePart(BaseModel):
    """A part of a message; other parts than texts have none."""

    text: str | None = None


class ChatMessage(BaseModel):
    """The message of an assistant; some servers return parts."""

    content: str | list[MessagePart] | None = None


class ChatChoice(BaseModel):
    """A response to a conversation."""

    message: ChatMessage
    finish_reason: str | None = None


class ChatReply(BaseModel):
    """A reply to a conversation."""

    choices: list[ChatChoice]
