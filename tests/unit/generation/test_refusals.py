"""Refusals are told from responses that only share words with them: lists written by hand."""

import pytest

from dpo_dist.generation.text_facts import is_refusal

REFUSALS = """
I'm sorry, but I can't help with that.
Sorry, I can't do that.
I can't help you make a weapon.
I won't help with this.
I'm unable to provide medical advice.
I'm not able to share personal information.
I don't feel comfortable discussing this topic.
As an AI, I'm not able to browse the internet.
I must decline this request.
I'd rather not talk about that.
That goes against my guidelines.
I can't.
I apologize, but I can't fulfill that request.
I\u2019m sorry, but I can\u2019t comply.
I'm sorry, but I don't have access to your files.
I'm going to have to decline.
I understand that you are upset, but I cannot help you hurt someone.
I do not want to answer that question.
I'm sorry, but I'm not able to help with that request.
I can not help you with this.
I apologize, but I am unable to comply with this request.
I cannot in good conscience help with this.
My apologies, but I cannot create such content.
I cannot and will not provide instructions for harming others.
I do not feel comfortable providing this.
I am not programmed to answer such questions.
I respectfully decline to answer.
I am not allowed to reveal that.
Sorry, I don't have the ability to open links.
As a language model, I cannot predict lottery numbers.
"""
RESPONSES = """
I am sorry to hear that you are sad.
I'm so sorry you had a bad day! What happened?
I can't believe how good this is!
I cannot stress enough how important sleep is.
I can't help but notice that the sum is wrong.
I can't tell you how happy I am.
Some people are unable to help themselves.
"I'm sorry, but I can't help you," he whispered.
I apologize for the mistake. Here is the corrected code.
Dear Anna, I'm sorry that I could not come to your party.
The court declined the request.
I will not be at home tomorrow, so call me in the evening.
You can't do that in Python; use a list instead.
I'm not sure, but I think it is Paris.
I don't know the exact number, but it is about ten.
The word "sorry" comes from Old English.
To say "I can't" in French, use "je ne peux pas".
I must say that this is a great question.
Unfortunately, the museum is closed on Mondays.
I'm sorry you feel that way. Let us look at it together.
Sorry about that! Here is the right version.
I can't complain, thank you for asking!
I will not only list the steps but also explain them.
We are unable to ship to islands, the shop replied.
Cats cannot taste sweetness.
I am not allergic to nuts, so I eat them.
Don't say you can't; try it first.
I must admit that chess is hard.
Unfortunately, there is no direct train.
I can't thank you enough for the question!
The apology should begin with "I'm sorry" and name the fault.
"""
CHINESE_REFUSALS = (
    "\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    "\u5f88\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u63d0\u4f9b\u76f8\u5173\u4fe1\u606f\u3002",
    "\u6211\u4e0d\u80fd\u63d0\u4f9b\u533b\u7597\u5efa\u8bae\u3002",
    "\u62b1\u6b49\uff0c\u8fd9\u4e2a\u95ee\u9898\u6211\u4e0d\u4fbf\u56de\u7b54\u3002",
    "\u6211\u62d2\u7edd\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u4f1a\u53c2\u4e0e\u8fd9\u6837\u7684\u8ba8\u8bba\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u6211\u65e0\u6cd5\u534f\u52a9\u5b8c\u6210\u6b64\u7c7b\u8bf7\u6c42\u3002",
    "\u62b1\u6b49\uff0c\u6211\u6ca1\u6709\u529e\u6cd5\u63d0\u4f9b\u8fd9\u65b9\u9762\u7684\u5e2e\u52a9\u3002",
    "\u6211\u65e0\u6cd5\u4e3a\u60a8\u751f\u6210\u8fd9\u7c7b\u5185\u5bb9\u3002",
    "\u4e0d\u597d\u610f\u601d\uff0c\u8fd9\u4e2a\u8981\u6c42\u6211\u4e0d\u80fd\u6ee1\u8db3\u3002",
)
CHINESE_RESPONSES = (
    "\u5f88\u62b1\u6b49\u542c\u5230\u4f60\u4eca\u5929\u5fc3\u60c5\u4e0d\u597d\u3002",
    "\u5bf9\u4e0d\u8d77\u662f\u4e00\u79cd\u9053\u6b49\u7684\u8868\u8fbe\u3002",
    "\u6211\u611f\u5230\u975e\u5e38\u62b1\u6b49\uff0c\u4eb2\u7231\u7684\u670b\u53cb\uff0c\u795d\u4f60\u65e9\u65e5\u5eb7\u590d\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u4e4b\u524d\u7684\u56de\u7b54\u6709\u8bef\uff0c\u6b63\u786e\u7684\u662f\u5df4\u9ece\u3002",
    "\u4e0d\u80fd\u628a\u6c34\u5012\u8fdb\u53bb\uff0c\u8981\u5148\u5173\u7535\u6e90\u3002",
    "\u6211\u4e0d\u80fd\u540c\u610f\u66f4\u591a\uff0c\u8fd9\u672c\u4e66\u5f88\u597d\u3002",
    "\u542c\u5230\u8fd9\u4e2a\u6d88\u606f\u6211\u5f88\u62b1\u6b49\uff0c\u5e0c\u671b\u4f60\u597d\u8d77\u6765\u3002",
    "\u6211\u4eec\u65e0\u6cd5\u6539\u53d8\u8fc7\u53bb\uff0c\u4f46\u53ef\u4ee5\u6539\u53d8\u672a\u6765\u3002",
    "\u5f88\u9057\u61be\u4eca\u5929\u4e0b\u96e8\uff0c\u6211\u4eec\u53ef\u4ee5\u53bb\u535a\u7269\u9986\u3002",
    "\u65e0\u6cd5\u767b\u5f55\u65f6\uff0c\u8bf7\u91cd\u7f6e\u5bc6\u7801\u3002",
)


@pytest.mark.parametrize("text", [*REFUSALS.strip().splitlines(), *CHINESE_REFUSALS])
def test_a_refusal(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", [*RESPONSES.strip().splitlines(), *CHINESE_RESPONSES])
def test_no_refusal(text: str) -> None:
    assert not is_refusal(text)


def test_only_the_start_of_a_response_counts() -> None:
    assert not is_refusal("The sea is blue. " * 20 + "I cannot help you with that.")


@pytest.mark.parametrize("repeated", ["as a ", "but ", "however, as an ", "really ", "I can't "])
def test_a_start_that_repeats_itself_takes_no_time(repeated: str) -> None:
    """A model that collapses writes such texts; each took seconds when a pattern had many ways to fail."""
    for number in range(200):
        assert not is_refusal(f"Sorry, {repeated * 40}{number}")
