"""Talk to a model in the terminal: that of a run or checkpoint, an adapter, a model folder or a hub name.

An empty line or Ctrl-D ends the chat, Ctrl-C ends an answer, `/new` starts a new conversation, and
`/image PATH` puts an image before the next question. From a pipe each line is a turn, and only answers are
printed: `echo "What is the capital of Iceland?" | dpo-dist chat output/captain`. A GPU is used if there is
one.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_dist.foundation.console import warnings_off
from dpo_dist.foundation.errors import Arguments, ExitCode, exit_after
from dpo_dist.foundation.streams import print_line
from dpo_dist.kit import locate_model, strip_key

if TYPE_CHECKING:
    from dpo_dist.data import ImageFile
    from dpo_dist.tools.chat.conversation import Conversation

_TRUST = "model.trust_remote_code=true"
_NEW, _IMAGE = "/new", "/image"
_HINT = (
    "an empty line or Ctrl-D ends the chat, Ctrl-C an answer; /new starts a new conversation, "
    "/image PATH puts an image before the next question"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist chat", description=__doc__)
    parser.add_argument("model", metavar="RUN", help="run directory, checkpoint, folder or hub name")
    usual = "default: as in the model's generation_config.json"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"{usual}, or 512, or what is left")
    parser.add_argument("--temperature", type=float, metavar="T", help=f"0: greedy; {usual}")
    meaning = "run Python code from the model's folder: read it first"
    parser.add_argument("trust", nargs="?", choices=[_TRUST], metavar=_TRUST, help=meaning)
    options = parser.parse_args(arguments)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is at least 1, not {options.max_new_tokens}")
    if not 0 <= (options.temperature or 0) < math.inf:
        parser.error(f"--temperature is a number of at least 0, not {options.temperature}")
    location = locate_model(strip_key(options.model), "RUN")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sampling = {}
    if options.temperature is not None:
        # Greedy generation has no temperature.
        sampling = {"do_sample": options.temperature > 0, "temperature": options.temperature or None}
    with warnings_off():
        # Imported late, so that errors above appear at once; bitsandbytes warns when it is imported.
        from dpo_dist.tools.chat.conversation import open_conversation  # noqa: PLC0415

        conversation = open_conversation(location, _say, options.trust is not None)
        conversation.sampling = sampling
        conversation.max_new_tokens = options.max_new_tokens
        _converse(conversation)
    return ExitCode.completed


def _converse(conversation: "Conversation") -> None:
    """Answer each question, with the images that come before it."""
    images: list[ImageFile] = []
    for question in _questions():
        command, *paths = question.split(maxsplit=1)
        if command == _IMAGE:
            images += conversation.open_images("".join(paths))
            continue
        if question == _NEW:
            conversation.begin()
        else:
            try:
                conversation.answer(question, images)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print_line("")  # the conversation does not keep this turn
        images = []


def _say(line: str) -> None:
    print_line(line, sys.stderr)


def _questions() -> Iterator[str]:
    """Yield the lines of standard input up to an empty one; a terminal shows a prompt."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401, PLC0415  (edits lines)

        print_line(_HINT, sys.stderr)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if not line:
            return
        if re.fullmatch(r"/\w*", line) and line not in (_NEW, _IMAGE):
            print_line(f"there is no {line}: {_HINT}", sys.stderr)
        else:
            yield line


if __name__ == "__main__":
    exit_after(main)
