"""Thumbnails beside prompts: small, of the decoded image, and with no request."""

import base64
import io
import re

from PIL import Image

from dpo_dist.data.records import ImageFile
from dpo_dist.tools.pages.answers import AnswersRow, answer_blocks
from dpo_dist.tools.pages.render import page
from dpo_dist.tools.pages.thumbnails import Thumbnails, thumbnails
from tests.support.image_processors import file_of
from tests.unit.tools.pages.made_run import HOSTILE


def plain(width: int, height: int, colour: str = "red") -> ImageFile:
    return ImageFile(file_of(Image.new("RGB", (width, height), colour)))


def shown(*images: str | None) -> tuple[AnswersRow, str]:
    return {"prompt": "what is it?", "responses": {"a": {"text": "it"}}, "images": images}, ""


def test_a_thumbnail_is_a_small_jpeg_of_the_image_and_an_unreadable_one_is_left_out() -> None:
    large, small, none = thumbnails([plain(1200, 600), plain(20, 9, "blue"), ImageFile(b"<svg>")])
    assert none is None
    for uri, size, colour in ((large, (160, 80), (254, 0, 0)), (small, (20, 9), (0, 0, 254))):
        image = Image.open(io.BytesIO(base64.b64decode((uri or "").removeprefix("data:image/jpeg;base64,"))))
        assert (image.format, image.size) == ("JPEG", size)
        assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), colour, strict=True)) < 3


def test_a_thumbnail_makes_no_request_and_is_inert() -> None:
    foreign: Thumbnails = [
        "https://example.com/x.png",
        f"data:image/jpeg;base64,{HOSTILE}",
        "data:text/html,x",
    ]
    html = page("x", answer_blocks([shown(*foreign)], 10**6))
    assert re.findall('<img src="([^"]*)"', html) == [html.split('<img src="')[1].split('"')[0]]
    assert html.count("<img") == 1
    assert "example.com" not in html
    assert "<script>alert" not in html
    assert "text/html" not in html
