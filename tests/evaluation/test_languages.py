"""The language of a text by its script and small words."""

import pytest

from ragtune_ray.evaluation.languages import count_languages, language_of

QUESTIONS = {
    "ar": "متى بني الجسر؟",
    "cs": "Kdy byl postaven most a kdo ho navrhl?",
    "da": "Hvornår blev broen bygget?",
    "de": "Wie kommt ein Lastwagen in das Lager?",
    "el": "Πότε χτίστηκε η γέφυρα;",
    "en": "How does a lorry get into the depot?",
    "es": "¿Cuándo se construyó el puente?",
    "fi": "Milloin silta on rakennettu?",
    "fr": "Quand le pont a-t-il été construit ?",
    "he": "מתי נבנה הגשר?",
    "hi": "पुल कब बना था?",
    "hu": "Mikor épült a híd?",
    "id": "Kapan jembatan itu dibangun?",
    "it": "Quando è stato costruito il ponte?",
    "ja": "橋はいつ建てられましたか?",
    "ko": "다리는 언제 지어졌나요?",
    "nl": "Wanneer werd de brug gebouwd?",
    "no": "Når ble broen bygget, og hva kostet den?",
    "pl": "Kiedy zbudowano most i kto go zaprojektował?",
    "pt": "Quando foi construída a ponte?",
    "ro": "Când a fost construit podul și cine l-a proiectat?",
    "ru": "Когда построили мост?",
    "sv": "När byggdes bron och vem ritade den?",
    "th": "สะพานสร้างเมื่อไร",
    "tr": "Köprü ne zaman inşa edildi?",
    "uk": "Коли збудували міст і хто?",
    "vi": "Cây cầu được xây dựng khi nào và ở đâu?",
    "zh": "桥是什么时候建的?",
}


@pytest.mark.parametrize("language", QUESTIONS)
def test_a_question_tells_its_language(language: str) -> None:
    assert language_of(QUESTIONS[language]) == language


@pytest.mark.parametrize("text", ["", "1969", "Neil Armstrong", "B-52", "w1 w2 w3"])
def test_names_and_numbers_have_no_language(text: str) -> None:
    assert language_of(text) == ""


def test_languages_are_counted_without_texts_that_cannot_say() -> None:
    texts = [QUESTIONS["de"], QUESTIONS["en"], "1969", QUESTIONS["en"]]
    assert list(count_languages(texts).items()) == [("en", 2), ("de", 1)]
