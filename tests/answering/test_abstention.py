"""The abstention rule on sentences that are abstentions and sentences that are not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.answering.abstention import is_abstention

ABSTENTIONS = [
    "",
    "  \n",
    "...",
    "[1]",
    "Answer:",
    "I'm sorry.",
    "I don't know",
    "I don’t know.",
    "i dont know",
    "I DO NOT KNOW!",
    '"I don\'t know."',
    "**I don't know.**",
    "I don't know. [1]",
    "I don't know [1, 2].",
    "I don't know the answer to this question.",
    "I don't know who won the race.",
    "I don't know, the passages do not say.",
    "I don't know based on the given passages.",
    "I don't know. The passages discuss only Mars.",
    "I don't know.\nThe passages discuss only Mars.",
    "Sorry, I do not know.",
    "I'm sorry, but the passages do not mention it.",
    "Answer: I don't know",
    "Sorry, based on the passages, I don't know.",
    "Based on the passages, I don't know.",
    "I cannot answer this question based on the provided context.",
    "I could not find the answer in the passages.",
    "not in the passages",
    "The answer is not in the passages.",
    "It is not mentioned in the text.",
    "cannot be answered from the passages",
    "The question cannot be answered from the passages.",
    "This can't be determined from the provided information.",
    "unanswerable",
    "The question is unanswerable.",
    "no answer",
    "No answer.",
    "There is no answer in the passages.",
    "There is no information about the crew in the passages.",
    "The passages do not say.",
    "The passages don't contain the answer.",
    "The passages do not mention Mr. Smith, Ms. Jones or anyone else.",
    "The provided context does not mention the year.",
    "None of the passages mention the year.",
    "不知道",
    "我不知道。",
    "我不知道这个问题的答案。",
    "我不知道是谁。",
    "无法回答",
    "无法回答该问题。",
    "这个问题无法回答。",
    "根据以上资料，无法回答这个问题。",
    "没有答案",
    "抱歉，没有答案。",
    "文中没有提到。",
    "文章未提及具体年份。",
    "I do not have enough information to answer.",
    "I don't have any information about the crew.",
    "There is no information about the crew.",
    "There is not enough information to answer the question.",
    "I'm sorry, I cannot find that.",
    "I could not find any information about the launch.",
    "I'm not sure.",
    "N/A",
    "N/A.",
    "Not mentioned.",
    "No information available.",
    "Ich weiß es nicht.",
    "Das weiß ich leider nicht.",
    "Ich weiß nicht, wer gewonnen hat.",
    "Leider, ich kann diese Frage nicht beantworten.",
    "Es gibt keine Informationen über die Besatzung.",
    "Ich habe nicht genügend Informationen.",
    "Der Text enthält keine Angaben dazu.",
    "Tut mir leid, ich kann das nicht finden.",
    "Je ne sais pas.",
    "Désolé, je ne sais pas qui a gagné.",
    "Je n'ai pas assez d’informations pour répondre.",
    "Il n'y a aucune information sur l'équipage.",
    "Les passages ne mentionnent pas la date.",
    "No lo sé.",
    "Lo siento, no sé quién ganó.",
    "No hay información sobre la tripulación.",
    "No tengo suficiente información.",
    "El texto no menciona la fecha.",
    "我没有足够的信息来回答这个问题。",
    "信息不足。",
    "没有关于船员的信息。",
    "我不清楚。",
    "無法回答這個問題。",
    "抱歉，找不到相关信息。",
]

ANSWERS = [
    "1969",
    "I don't know much, but it was 1969",
    "I don't know much about that",
    "I don't know, maybe 1969",
    "I don't know, 1969",
    "I don't know - 1969",
    "I don't know who won, but it was in 1969.",
    "I know",
    "Sorry Day",
    "I don't know how to love him, it is a song",
    "You don't know",
    "They said that they did not know.",
    "He did not answer the question",
    "No answer was ever received from the probe",
    "no",
    "not",
    "No Answers in Genesis",
    "unanswerable prayers",
    "The Unanswered Question",
    "It cannot be answered by observation alone",
    "It was not in the harbour",
    "The passages do not say when, but it was 1969",
    "The passages say 1969.",
    "The passage of 1969 did not fail",
    "The text of the treaty",
    "It was 1969. I don't know more.",
    "不知道乐队",
    "我不知道日期，但是一九六九年",
    "没有答案的问题是一首歌",
    "文中提到了一九六九年",
    "文章没有写完就发表了",
    "Na",
    "no evidence",
    "no information technology before 1950",
    "There is no information, it was 1969",
    "I have enough information to answer: 1969",
    "not available light but flash",
    "Ich weiß nicht, vielleicht 1969",
    "Keine Atomkraft",
    "Der Text erschien nicht in Berlin",
    "Je ne sais pas, peut-être 1969",
    "Le texte ne fut publié qu'en 1969",
    "No lo sé, quizás en 1969",
    "No hay mal que por bien no venga",
    "不清楚的照片",
    "没有足够的燃料",
    "It was launched in 1969, although there is no information about the crew.",
    "The rocket flew in 1969. There is no information about the crew.",
]


@pytest.mark.parametrize("text", ABSTENTIONS)
def test_a_refusal_is_an_abstention(text: str) -> None:
    assert is_abstention(text)


def test_a_title_that_reads_like_a_refusal_counts_as_one() -> None:
    assert is_abstention("I Don't Know How to Love Him")


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_not_an_abstention(text: str) -> None:
    assert not is_abstention(text)


@given(st.sampled_from(ABSTENTIONS), st.sampled_from(["[1]", " ", "\n", '"', "*"]))
def test_marks_and_quotes_around_the_text_change_nothing(text: str, mark: str) -> None:
    assert is_abstention(f"{mark}{text}{mark}")
    assert not is_abstention(f"{mark}It was 1969{mark}")


@given(st.sampled_from([text for text in ABSTENTIONS if text.strip(" .\n[1]")]))
def test_an_answer_before_the_refusal_is_an_answer(text: str) -> None:
    assert not is_abstention(f"It was 1969. {text}")


@given(st.text())
def test_sentences_after_the_first_are_ignored(text: str) -> None:
    assert is_abstention(f"I don't know. So {text}")
    assert not is_abstention(f"Apollo 11 did. So {text}")


@pytest.mark.parametrize("text", ["Non lo so.", "non  lo\nSO", '"Non lo so" [1].', "**Non lo so!**"])
def test_taught_words_alone_are_an_abstention(text: str) -> None:
    assert is_abstention(text, "Non lo so.")
    assert not is_abstention(text)
    assert not is_abstention(f"{text} 1969", "Non lo so.")


def test_taught_words_do_not_change_the_rule() -> None:
    assert is_abstention("J’ignore la réponse", "J'ignore la réponse.")
    assert is_abstention("I don't know.", "Je ne sais pas.")
    assert not is_abstention("1969", "...")


@given(st.text())
def test_any_text_can_be_judged(text: str) -> None:
    assert isinstance(is_abstention(text), bool)


@pytest.mark.parametrize(
    "unit", ["the passages ", "no information ", "i don't know who ", "sorry, ", "not in ", "[1]", "没有", "的"]
)
def test_long_hostile_text_takes_linear_time(unit: str) -> None:
    start = time.perf_counter()
    is_abstention(unit * 100_000, unit * 100_000)
    assert time.perf_counter() - start < 1
