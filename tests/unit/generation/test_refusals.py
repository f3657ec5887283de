"""Refusals are told from responses that only share words with them: lists written by hand."""

import pytest

from dpo_dist.generation.text_facts import is_refusal

REFUSALS = """
I'm sorry, but I can't help with that.
I am sorry, but I cannot assist with that request.
Sorry, I can't do that.
I cannot do that
I can't help you make a weapon.
I cannot provide instructions for that.
I won't help with this.
I will not write that story.
I'm unable to provide medical advice.
I am unable to assist with this.
I'm not able to share personal information.
I'm not comfortable answering that.
I don't feel comfortable discussing this topic.
As an AI language model, I cannot give you financial advice.
As an AI, I'm not able to browse the internet.
Unfortunately, I can't generate that kind of content.
I must decline this request.
I have to respectfully decline.
I'd rather not talk about that.
I refuse to answer this.
That goes against my guidelines.
No, I won't do it.
I can't.
I'm sorry, but no.
I apologize, but I can't fulfill that request.
I'm afraid I can't help with that.
I\u2019m sorry, but I can\u2019t comply.
That is not something I can help with.
I'm sorry, but I don't have access to your files.
I'm really sorry, but I am not allowed to discuss that.
I'm going to have to decline.
Thank you for asking, but I can't share that information.
I understand that you are upset, but I cannot help you hurt someone.
It's important to be safe. I can't provide steps for that.
I do not want to answer that question.
I would prefer not to answer.
I'm sorry, but I'm not able to help with that request.
I'm sorry, I cannot provide that information.
I can not help you with this.
Sorry, but as an AI I can't assist with hacking.
I apologize, but I am unable to comply with this request.
I really can't answer that.
I cannot in good conscience help with this.
I won't be able to assist you with that.
My apologies, but I cannot create such content.
I'm just an AI, I can't provide legal advice.
I cannot and will not provide instructions for harming others.
I can't engage in conversations that promote hatred.
I do not feel comfortable providing this.
I'm not going to help you with that.
I am not programmed to answer such questions.
This violates my policies, so I must refuse.
I respectfully decline to answer.
I can't discuss this subject.
I am not allowed to reveal that.
Unfortunately, I am unable to access the website.
Sorry, I don't have the ability to open links.
I'm sorry, but that would be illegal, and I won't take part in it.
As a language model, I cannot predict lottery numbers.
I have to decline that request.
"""
RESPONSES = """
I am sorry to hear that you are sad.
I'm sorry for your loss. Take your time.
I'm so sorry you had a bad day! What happened?
I can't wait to tell you about this recipe.
I can't believe how good this is!
I won't lie, it is difficult.
I cannot stress enough how important sleep is.
I can't recommend this book enough.
I can't help but notice that the sum is wrong.
I can't help thinking of the sea.
I can't tell you how happy I am.
If you are unable to provide a passport, bring an identity card.
Some people are unable to help themselves.
She said, "I can't help you," and left.
"I'm sorry, but I can't help you," he whispered.
I'm sorry for the confusion. The answer is 42.
I apologize for the mistake. Here is the corrected code.
Sorry for the delay, here is your summary.
Dear Anna, I'm sorry that I could not come to your party.
He refused to answer the question.
The court declined the request.
You cannot divide by zero.
I will not be at home tomorrow, so call me in the evening.
As an AI language model, I don't have feelings, but here is a poem.
You can't do that in Python; use a list instead.
I am going to help you with your essay.
I'm not sure, but I think it is Paris.
I'm not going to sugarcoat it: the plan is risky.
I don't know the exact number, but it is about ten.
Sorry, not sorry: pineapple belongs on pizza.
The word "sorry" comes from Old English.
I can help with that! First, open the menu.
To say "I can't" in French, use "je ne peux pas".
No, the capital of Australia is Canberra.
I must say that this is a great question.
I have to agree with you.
Unfortunately, the museum is closed on Mondays.
I won't go into details, but the method is simple: boil, then cool.
I'm sorry you feel that way. Let us look at it together.
I am very sorry about the damage to your parcel; we will send a new one.
Sorry about that! Here is the right version.
I can't imagine a better place than Lisbon.
I can't complain, thank you for asking!
I couldn't find a mistake in your code.
I will not only list the steps but also explain them.
I won't bore you with history: the short answer is yes.
We are unable to ship to islands, the shop replied.
A refusal can be polite: "Thank you, but I can't come."
Cats cannot taste sweetness.
My car can't start. What should I do?
I am not allergic to nuts, so I eat them.
I'm not able-bodied, wrote the author in her memoir.
Don't say you can't; try it first.
I don't have a favourite colour, but blue is popular.
I must admit that chess is hard.
I have to write a report, so here is the outline.
Unfortunately, there is no direct train.
The manager was not comfortable with the plan.
I can't thank you enough for the question!
I'm sorry, what did you mean by "it"?
The apology should begin with "I'm sorry" and name the fault.
I cannot overstate how useful this is.
"""
CHINESE_REFUSALS = (
    "\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u80fd\u5e2e\u52a9\u4f60\u505a\u8fd9\u4ef6\u4e8b\u3002",
    "\u5f88\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u63d0\u4f9b\u76f8\u5173\u4fe1\u606f\u3002",
    "\u6211\u65e0\u6cd5\u534f\u52a9\u60a8\u5b8c\u6210\u8fd9\u4e2a\u8bf7\u6c42\u3002",
    "\u6211\u4e0d\u80fd\u63d0\u4f9b\u533b\u7597\u5efa\u8bae\u3002",
    "\u4f5c\u4e3a\u4e00\u4e2a\u4eba\u5de5\u667a\u80fd\uff0c\u6211\u65e0\u6cd5\u6ee1\u8db3\u4f60\u7684\u8981\u6c42\u3002",
    "\u62b1\u6b49\uff0c\u8fd9\u4e2a\u95ee\u9898\u6211\u4e0d\u4fbf\u56de\u7b54\u3002",
    "\u4e0d\u597d\u610f\u601d\uff0c\u6211\u6ca1\u529e\u6cd5\u5e2e\u4f60\u5199\u8fd9\u4e2a\u3002",
    "\u6211\u62d2\u7edd\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    "\u5f88\u9057\u61be\uff0c\u6211\u4e0d\u80fd\u6ee1\u8db3\u60a8\u7684\u8bf7\u6c42\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u4f1a\u53c2\u4e0e\u8fd9\u6837\u7684\u8ba8\u8bba\u3002",
    "\u6211\u4eec\u6362\u4e2a\u8bdd\u9898\u5427\uff0c\u6211\u4e0d\u80fd\u8ba8\u8bba\u8fd9\u4e2a\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u6211\u65e0\u6cd5\u534f\u52a9\u5b8c\u6210\u6b64\u7c7b\u8bf7\u6c42\u3002",
    "\u5f88\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    "\u62b1\u6b49\uff0c\u6211\u6ca1\u6709\u529e\u6cd5\u63d0\u4f9b\u8fd9\u65b9\u9762\u7684\u5e2e\u52a9\u3002",
    "\u6211\u4e0d\u80fd\u5e2e\u4f60\u5199\u8fd9\u6837\u7684\u5185\u5bb9\u3002",
    "\u6211\u65e0\u6cd5\u4e3a\u60a8\u751f\u6210\u8fd9\u7c7b\u5185\u5bb9\u3002",
    "\u4f5c\u4e3aAI\u52a9\u624b\uff0c\u6211\u4e0d\u80fd\u53c2\u4e0e\u8fdd\u6cd5\u6d3b\u52a8\u3002",
    "\u4e0d\u597d\u610f\u601d\uff0c\u8fd9\u4e2a\u8981\u6c42\u6211\u4e0d\u80fd\u6ee1\u8db3\u3002",
    "\u975e\u5e38\u62b1\u6b49\uff0c\u6839\u636e\u89c4\u5b9a\u6211\u4e0d\u53ef\u4ee5\u900f\u9732\u8fd9\u4e9b\u4fe1\u606f\u3002",
)
CHINESE_RESPONSES = (
    "\u5f88\u62b1\u6b49\u542c\u5230\u4f60\u4eca\u5929\u5fc3\u60c5\u4e0d\u597d\u3002",
    "\u62b1\u6b49\u8ba9\u4f60\u4e45\u7b49\u4e86\uff0c\u7b54\u6848\u662f\u56db\u5341\u4e8c\u3002",
    "\u5bf9\u4e0d\u8d77\u662f\u4e00\u79cd\u9053\u6b49\u7684\u8868\u8fbe\u3002",
    "\u5982\u679c\u65e0\u6cd5\u63d0\u4f9b\u62a4\u7167\uff0c\u53ef\u4ee5\u5e26\u8eab\u4efd\u8bc1\u3002",
    "\u6211\u611f\u5230\u975e\u5e38\u62b1\u6b49\uff0c\u4eb2\u7231\u7684\u670b\u53cb\uff0c\u795d\u4f60\u65e9\u65e5\u5eb7\u590d\u3002",
    "\u8fd9\u4e2a\u65b9\u6cd5\u65e0\u6cd5\u56de\u7b54\u6240\u6709\u95ee\u9898\uff0c\u4f46\u5f88\u6709\u7528\u3002",
    "\u5bf9\u4e0d\u8d77\uff0c\u4e4b\u524d\u7684\u56de\u7b54\u6709\u8bef\uff0c\u6b63\u786e\u7684\u662f\u5df4\u9ece\u3002",
    "\u4ed6\u8bf4\uff1a\u201c\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u80fd\u5e2e\u4f60\u3002\u201d",
    "\u4e0d\u80fd\u628a\u6c34\u5012\u8fdb\u53bb\uff0c\u8981\u5148\u5173\u7535\u6e90\u3002",
    "\u6211\u65e0\u6cd5\u76f8\u4fe1\u8fd9\u662f\u771f\u7684\uff01",
    "\u6211\u4e0d\u80fd\u540c\u610f\u66f4\u591a\uff0c\u8fd9\u672c\u4e66\u5f88\u597d\u3002",
    "\u5df4\u9ece\u662f\u6cd5\u56fd\u7684\u9996\u90fd\u3002",
    "\u542c\u5230\u8fd9\u4e2a\u6d88\u606f\u6211\u5f88\u62b1\u6b49\uff0c\u5e0c\u671b\u4f60\u597d\u8d77\u6765\u3002",
    "\u62b1\u6b49\uff0c\u6211\u521a\u624d\u7b97\u9519\u4e86\uff0c\u7ed3\u679c\u5e94\u8be5\u662f\u5341\u3002",
    "\u6211\u4eec\u65e0\u6cd5\u6539\u53d8\u8fc7\u53bb\uff0c\u4f46\u53ef\u4ee5\u6539\u53d8\u672a\u6765\u3002",
    "\u6211\u4e0d\u80fd\u6ca1\u6709\u4f60\uff0c\u8fd9\u662f\u4e00\u9996\u6b4c\u7684\u540d\u5b57\u3002",
    "\u5f88\u9057\u61be\u4eca\u5929\u4e0b\u96e8\uff0c\u6211\u4eec\u53ef\u4ee5\u53bb\u535a\u7269\u9986\u3002",
    "\u9053\u6b49\u65f6\u53ef\u4ee5\u8bf4\u201c\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u4f1a\u518d\u72af\u201d\u3002",
    "\u65e0\u6cd5\u767b\u5f55\u65f6\uff0c\u8bf7\u91cd\u7f6e\u5bc6\u7801\u3002",
    "\u6211\u4f1a\u5e2e\u52a9\u4f60\u5b8c\u6210\u8fd9\u4e2a\u4efb\u52a1\u3002",
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
