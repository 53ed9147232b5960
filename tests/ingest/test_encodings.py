"""Files that are not UTF-8 are decoded right or rejected, never wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragtune_ray.config import Config, ConfigError, Corpus
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.parsing.text import ParseError, decode
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document

CERTAIN = [
    (
        "cp1252",
        "Le conseil a décidé que la réunion aurait lieu à l’hôtel, où les élèves étaient logés. Ça coûte très cher.",
    ),
    ("cp1252", "Die Größe überschreitet die zulässige Höhe."),
    ("cp1252", "El año pasado la señora Muñoz compró un camión pequeño en España."),
    ("cp1252", "The device’s manual says “do not open” – it costs 5€."),
    ("cp1252", "I går sneede det i København, og børnene legede på gaden. Så gik de hjem på række."),
    ("cp1252", "Ontem não choveu em São Paulo, e as crianças brincaram até à noite."),
    ("latin-1", "Größe und Höhe"),
    ("cp1250", "Zażółć gęślą jaźń. Wczoraj w Łodzi spadł śnieg, a dzieci zjeżdżały na sankach z góry."),
    ("cp1251", "Вчера в Москве выпал снег, и дети катались на санках с горы до самого вечера."),
    ("koi8-r", "Вчера в Москве выпал снег, и дети катались на санках с горы до самого вечера."),
    ("cp1253", "Χθες χιόνισε στην Αθήνα και τα παιδιά έπαιζαν στο πάρκο μέχρι το βράδυ."),
    ("gb18030", "昨天北京下了雪，孩子们在公园里玩到晚上。火箭发射成功。"),
    ("shift_jis", "昨日東京に雪が降り、子供たちは夕方まで公園で遊んでいました。"),
    ("euc-kr", "어제 서울에 눈이 내려서 아이들이 저녁까지 공원에서 놀았습니다."),
    ("utf-16", "Hello"),
]
UNCERTAIN = [
    ("cp1254", "Dün İstanbul’a kar yağdı ve çocuklar akşama kadar parkta oynadılar, şimdi üşüyorlar."),
    ("cp1250", "Copiii se joacă în parc până seara"),
    ("cp1250", "Čaj već"),
    ("cp1257", "Vakar Rīgā sniga, un bērni līdz vakaram spēlējās parkā. Šodien ir aukstāks."),
    ("cp850", "Le conseil a décidé que la réunion aurait lieu à l'hôtel, où les élèves étaient logés."),
    ("mac_roman", "Le conseil a décidé que la réunion aurait lieu à l’hôtel, où les élèves étaient logés."),
]


@pytest.mark.parametrize(("encoding", "text"), CERTAIN)
def test_a_certain_encoding_is_found(encoding: str, text: str) -> None:
    assert decode(text.encode(encoding)).removeprefix("\ufeff") == text


@pytest.mark.parametrize(("encoding", "text"), UNCERTAIN)
def test_an_uncertain_encoding_is_refused_unless_it_is_named(encoding: str, text: str) -> None:
    with pytest.raises(ParseError, match=r"no other encoding is certain; set corpus\.encoding"):
        decode(text.encode(encoding))
    assert decode(text.encode(encoding), encoding) == text


def test_a_named_encoding_is_used_for_text_and_markdown_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Čaj već".encode("cp1250"))
    (tmp_path / "b.md").write_bytes("# Čaj\n\nveć".encode("cp1250"))
    plan = plan_units(str(tmp_path), 1000)
    found = [item for unit in plan.units for item in read_documents(unit, Corpus(encoding="windows-1250"))]
    assert [item.text for item in found if isinstance(item, Document)] == ["Čaj već", "# Čaj\n\nveć"]
    with pytest.raises(ParseError, match=r"not ascii \(byte 0xe8 at 0\); correct corpus\.encoding"):
        decode(b"\xe8", "ascii")


@pytest.mark.parametrize("name", ["klingon", "base64", ""])
def test_an_unknown_encoding_is_refused_in_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.encoding"):
        Config().using(f"corpus.encoding={name!r}")
