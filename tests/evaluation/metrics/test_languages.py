"""The language of texts, and the warning where it is not that of the config."""

from __future__ import annotations

from typing import Any

import pytest

from ragtune_ray import schema
from ragtune_ray.evaluation import scoring
from ragtune_ray.evaluation.metrics.languages import language_of, other_language, warning

SENTENCES = {
    "de": "Der Vertrag kann von beiden Seiten mit einer Frist von vier Wochen zum Ende eines Monats gekündigt werden.",
    "fr": "Le contrat peut être résilié par les deux parties avec un préavis de quatre semaines à la fin du mois.",
    "es": "El contrato puede ser rescindido por ambas partes con un plazo de cuatro semanas hasta el final del mes.",
    "it": "Il contratto può essere disdetto da entrambe le parti con un preavviso di quattro settimane alla fine del mese.",
    "pt": "O contrato pode ser rescindido por ambas as partes com um prazo de quatro semanas até ao fim do mês.",
    "nl": "Het contract kan door beide partijen worden opgezegd met een termijn van vier weken aan het einde van de maand.",
    "tr": "Sözleşme her iki tarafça ayın sonuna kadar dört hafta önceden bildirilerek feshedilebilir.",
    "ru": "Договор может быть расторгнут обеими сторонами с уведомлением за четыре недели до конца месяца.",
    "en": "The contract can be terminated by either side with four weeks of notice to the end of a month.",
    "ja": "契約は、双方が月末までに四週間前に通知することで解約できます。",
    "ko": "계약은 양 당사자가 월말까지 4주 전에 통지하여 해지할 수 있습니다 그리고 그렇다",
    "zh": "合同可由双方提前四周通知，在月底终止。",
    "th": "สัญญาสามารถยกเลิกได้โดยทั้งสองฝ่าย",
    "ar": "يمكن لأي من الطرفين إنهاء العقد بإشعار مدته أربعة أسابيع حتى نهاية الشهر",
    "el": "Η σύμβαση μπορεί να καταγγελθεί από οποιαδήποτε πλευρά με προειδοποίηση τεσσάρων εβδομάδων",
}
UNSURE = {
    "pl": "Umowa może zostać rozwiązana przez obie strony z czterotygodniowym okresem wypowiedzenia na koniec miesiąca.",
    "fi": "Kumpikin osapuoli voi irtisanoa sopimuksen neljän viikon irtisanomisajalla kuukauden lopussa.",
    "ca": "El contracte pot ser rescindit per ambdues parts amb un termini de quatre setmanes fins al final del mes.",
    "names": "Neil Armstrong, Buzz Aldrin, Michael Collins, Houston, Cape Canaveral, Los Angeles, La Paz, Le Havre, Den Haag",
    "numbers": "1969, 12 %, 4.5, 10:30, -3 °C, 1 2 3 4 5 6 7 8 9 10",
    "short": "der Mond",
    "mixed": "The contract 合同可由双方提前四周通知 can be terminated by either side",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_shows_its_language(language: str) -> None:
    assert language_of(SENTENCES[language]) == language


@pytest.mark.parametrize("text", UNSURE.values(), ids=UNSURE)
def test_what_is_not_clear_has_no_language(text: str) -> None:
    assert language_of(text) == ""


@pytest.mark.parametrize("language", [*SENTENCES, "pl", "fi", "uk", "other"])
def test_texts_in_the_language_of_the_config_or_in_none_bring_no_warning(language: Any) -> None:
    own = {
        "uk": "Договір може бути розірваний обома сторонами з повідомленням за чотири тижні до кінця місяця."
    } | UNSURE
    text = (SENTENCES | own).get(language, UNSURE["names"])
    assert other_language([text, UNSURE["names"], UNSURE["numbers"]] * 5, language) is None
    assert other_language([text] * 5, language) is None


def test_the_share_of_another_language_counts_words_of_short_texts_together() -> None:
    german, english = SENTENCES["de"].split(), SENTENCES["en"].split()
    pieces = [" ".join(words[at : at + 3]) for words in (german * 20, english * 20) for at in range(0, 300, 3)]
    found = other_language(pieces, "en")
    assert found is not None
    assert found[0] == "de"
    assert found[1] == pytest.approx(0.5, abs=0.08)
    assert other_language([SENTENCES["de"]] + [SENTENCES["en"]] * 9, "en") is None, "a tenth may be quotations"
    assert other_language([SENTENCES["en"]] * 9, "fi") == ("en", 1.0)


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("ja", ["東京都", "織田信長", "豊臣秀吉", "徳川家康", "大阪府", "京都府", "関ヶ原", "江戸幕府", "明治維新"]),
        ("cs", ["Smlouva se zavazuje na dva roky a o rok se prodlouží.", "Na podzim se o to postará a do konce roku se vrátí."] * 5),
        ("pl", ["Nie ma umowy, a o tym nie wie ani on, ani ona, bo do dziś nikt o nią nie pytał."] * 9),
    ],
)  # fmt: skip
def test_a_language_is_not_taken_for_another_that_shares_its_signs_or_short_words(
    language: Any, texts: list[str]
) -> None:
    assert warning("the gold answers", texts, language) == ""
    english = warning("the gold answers", [SENTENCES["en"]] * 9, language)
    assert "in English" in english


def test_gold_answers_and_each_arm_are_warned_about() -> None:
    queries = [schema.Query(str(number), "?", (SENTENCES["de"],), (), (), "all") for number in range(9)]

    def rows(text: str, **facts: Any) -> list[schema.Answer]:
        values: dict[str, Any] = {"abstained": False, "status": "ok", "error": ""} | facts
        return [
            schema.Answer(
                each.query_id, "?", text, (), (), (), seconds=0.0, prompt_tokens=0, completion_tokens=0, index_version="",
                model="", **values,
            )
            for each in queries
        ]  # fmt: skip

    answers = {"base": rows(SENTENCES["en"]), "rag": rows(SENTENCES["de"]), "ft": rows(SENTENCES["en"], abstained=True)}
    assert scoring.language_warnings(queries, answers, "de") == [
        (
            "Nearly all of the answers of base are in English, but evaluate.language is de: an answer in another language "
            "than the gold answer is wrong to every metric that compares words."
        )
    ]
    first, second = scoring.language_warnings(queries, answers, "en")
    assert (
        first == "Nearly all of the gold answers are in German, but evaluate.language is en: set evaluate.language=de."
    )
    assert second.startswith("Nearly all of the answers of rag are in German, but evaluate.language is en")
    assert warning("the gold answers", [SENTENCES["de"]] * 3 + [SENTENCES["en"]] * 6, "en").endswith(
        "score each language by itself."
    )
