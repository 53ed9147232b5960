"""Properties of chunking over mixed text, and named cases of boundaries."""

import itertools
import re

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ragtune_ray.ingest import chunking
from ragtune_ray.ingest.chunking import TokenSpans, chunk, chunk_all, tokenizer_spans, word_spans
from ragtune_ray.schema import Document, Passage

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "unhappily e.g. Dr. Smith 3.14",
    "火箭发射。卫星",
    "naïve café",
] * 3


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=30))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


COUNTERS = {
    "words": word_spans,
    "wordpiece": tokenizer_spans(wordpiece()),
    "byte_bpe": tokenizer_spans(byte_bpe()),
}
PIECES = st.one_of(
    st.sampled_from(
        ["the ", "fox ", "dog. ", "Dr. ", "U.S. ", "e.g. ", "3.14 ", "why? ", "so, ", "end.) ", "it's ", "a-b "]
    ),
    st.sampled_from(["火", "箭发射", "。", "，", "卫星！”", "สวัสดี", "ไทยน้ำ", "テスト", "「", "」", "2008年"]),
    st.sampled_from(["👩‍👩‍👧‍👦", "🇫🇷🇩🇪", "e\u0301\u0323", "👍🏽", "नमस्ते ", "각", "\u1100\u1161\u11a8"]),
    st.sampled_from([" ", "   ", "\n", "\n\n", "\r\n", "\t", "\n \n\n", "\u3000", "\u00a0"]),
    st.sampled_from(["ACGT" * 12, "aGVsbG8+d29/" * 4, "x" * 40, "https://a.example/b?c=d "]),
    st.text(max_size=6),
)
TEXTS = st.lists(PIECES, max_size=60).map("".join)
SIZES = st.tuples(st.integers(8, 40), st.integers(0, 20)).map(lambda sizes: (sizes[0], min(sizes[1], sizes[0] // 2)))


def document(text: str) -> Document:
    return Document("d", text, "Title", '{"a": 1}', "place")


def texts_of(text: str, size: int, overlap: int = 0, spans: TokenSpans = word_spans) -> list[str]:
    return [passage.text for passage in chunk(document(text), spans, size, overlap)]


def num_tokens(spans: TokenSpans, text: str) -> int:
    return len(spans([text])[0])


@pytest.mark.parametrize("counter", COUNTERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, sizes=SIZES)
def test_passages_are_slices_that_fit_and_cover_the_text(counter: str, text: str, sizes: tuple[int, int]) -> None:
    spans, (size, overlap) = COUNTERS[counter], sizes
    passages = chunk(document(text), spans, size, overlap)
    covered = np.zeros(len(text), dtype=bool)
    for number, passage in enumerate(passages):
        assert passage == Passage(
            f"d#{number}", "d", text[passage.start : passage.end], "Title", '{"a": 1}', passage.start, passage.end
        )
        assert passage.text
        assert passage.text == passage.text.strip()
        covered[passage.start : passage.end] = True
        own = num_tokens(spans, passage.text)
        assert own <= size or len(passage.text) == 1
    assert all(covered[i] or text[i].isspace() for i in range(len(text)))
    for one, two in itertools.pairwise(passages):
        assert one.start < two.start
        assert one.end < two.end
        shared = spans([two.text])[0][:, 0] < one.end - two.start
        assert shared.sum() <= overlap


@pytest.mark.parametrize("counter", COUNTERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, sizes=SIZES)
def test_words_and_graphemes_are_split_only_if_too_long_alone(counter: str, text: str, sizes: tuple[int, int]) -> None:
    spans, (size, overlap) = COUNTERS[counter], sizes
    runs = [(match.start(), match[0]) for match in re.finditer(r"\S+", text)]  # a space is always a boundary
    graphemes = [(at + m.start(), at + m.end()) for at, run in runs for m in regex.finditer(r"\X", run)]
    pieces = [match.span() for match in regex.finditer(rf"[^\s{chunking.UNSPACED_SCRIPTS}]+", text)]
    words = [(a, b) for a, b in pieces if regex.fullmatch(r"[^\W\p{M}\u200d]\w*", text[a:b])]
    for passage in chunk(document(text), spans, size, overlap):
        for cut in (passage.start, passage.end):
            for start, end in graphemes + words:
                assert not start < cut < end or num_tokens(spans, text[start:end]) > size


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5), sizes=SIZES)
def test_document_is_split_equally_alone_and_in_a_batch(texts: list[str], sizes: tuple[int, int]) -> None:
    documents = [document(text) for text in texts]
    together = chunk_all(documents, COUNTERS["byte_bpe"], *sizes)
    assert together == [chunk(one, COUNTERS["byte_bpe"], *sizes) for one in documents]


@settings(max_examples=150, deadline=None)
@given(num_words=st.integers(41, 400), overlap=st.integers(0, 20))
def test_last_passage_is_at_least_a_quarter_of_the_size(num_words: int, overlap: int) -> None:
    passages = chunk(document("word " * num_words), word_spans, 40, overlap)
    assert num_tokens(word_spans, passages[-1].text) >= 10
    assert len(passages) <= 2 + num_words // (40 * 2 // 3 - overlap)


def test_document_that_fits_is_one_stripped_passage() -> None:
    (passage,) = chunk(document("  One two.\n\nThree. \n"), word_spans, 8, 2)
    assert (passage.start, passage.end, passage.text) == (2, 18, "One two.\n\nThree.")


@pytest.mark.parametrize("text", ["", " \n\t\u3000"])
def test_document_of_whitespace_has_no_passages(text: str) -> None:
    assert texts_of(text, 8) == []


TEN = "aa bb cc dd ee ff gg hh ii jj"  # ten tokens; a passage of sixteen looks for a boundary after them
REST = " kk ll mm nn oo pp qq rr ss tt uu vv ww xx yy zz"
TEN_CHINESE = "一二三四五六七八九十"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        pytest.param(f"{TEN} kk\n\nll. Mm{REST}", f"{TEN} kk", id="paragraph_before_sentence"),
        pytest.param(f"{TEN}. Kk, ll{REST}", f"{TEN}.", id="sentence_before_clause"),
        pytest.param(f'{TEN} "kk." Ll{REST}', f'{TEN} "kk."', id="closing_quote_stays"),
        pytest.param(f"{TEN}? Kk Dr. Ll{REST}", f"{TEN}?", id="title_ends_no_sentence"),
        pytest.param(f"{TEN}! U.S. Army{REST}", f"{TEN}!", id="initials_end_no_sentence"),
        pytest.param(f"{TEN}. J. Smith{REST}", f"{TEN}.", id="initial_ends_no_sentence"),
        pytest.param(f"{TEN}. Kk e.g. Ll{REST}", f"{TEN}.", id="eg_ends_no_sentence"),
        pytest.param(f"{TEN}. Kk 3.14 Ll{REST}", f"{TEN}.", id="decimal_ends_no_sentence"),
        pytest.param(f"{TEN}. Kk cell. ll{REST}", f"{TEN}.", id="lower_case_letter_starts_no_sentence"),
        pytest.param(f"{TEN}.\n1. Kk ll{REST}", f"{TEN}.", id="list_number_ends_no_sentence"),
        pytest.param(f"{TEN}. Kk 1969. Ll{REST}", f"{TEN}. Kk 1969.", id="year_may_end"),
        pytest.param(f"{TEN}, ll{REST}", f"{TEN},", id="clause_before_space"),
        pytest.param(f"{TEN}{REST}", f"{TEN} kk ll mm nn oo pp", id="space"),
        pytest.param(f"{TEN_CHINESE}二。三，四{TEN_CHINESE * 2}", f"{TEN_CHINESE}二。", id="chinese_sentence"),
        pytest.param(f"{TEN_CHINESE}？”三，四{TEN_CHINESE * 2}", f"{TEN_CHINESE}？”", id="chinese_closing_quote"),
        pytest.param(f"{TEN_CHINESE}二，三四{TEN_CHINESE * 2}", f"{TEN_CHINESE}二，", id="chinese_clause"),
        pytest.param(f"{TEN_CHINESE * 3}", f"{TEN_CHINESE}一二三四五六", id="chinese_characters"),
        pytest.param(
            f"{TEN_CHINESE}一二三四五六」{TEN_CHINESE}", f"{TEN_CHINESE}一二三四五", id="no_closing_mark_at_the_start"
        ),
    ],
)
def test_passage_ends_at_the_best_boundary_of_its_window(text: str, first: str) -> None:
    assert texts_of(text, 16)[0] == first


def test_overlap_starts_with_a_sentence_within_reach() -> None:
    text = "A b c d e f g h. I j k l. M n o p q r s t u v w x y z."
    assert texts_of(text, 15, 6)[:2] == ["A b c d e f g h. I j k l.", "I j k l. M n o p q r s t u v"]


def test_overlap_starts_with_a_word_without_a_sentence_within_reach() -> None:
    one, two = texts_of("aa bb cc dd ee ff gg hh ii jj kk ll mm nn", 9, 3)
    assert (one, two) == ("aa bb cc dd ee ff gg hh ii", "gg hh ii jj kk ll mm nn")


def test_overlap_of_chinese_starts_with_a_sentence() -> None:
    text = "一二三四五六七八。九十。一二三四五六七八九十一二三四五六七八九十"
    assert texts_of(text, 12, 5)[:2] == ["一二三四五六七八。九十。", "九十。一二三四五六七八九"]


def test_only_a_word_longer_than_the_size_is_split() -> None:
    spans = COUNTERS["byte_bpe"]
    passages = texts_of("fox " + "ACGT" * 30 + " dog", 20, 4, spans)
    assert passages[0] == "fox"
    assert "".join(passages[1:]).replace(" ", "") == "ACGT" * 30 + "dog"
    assert all(num_tokens(spans, passage) <= 20 for passage in passages)


def first_word_costs_more(texts: list[str]) -> list[np.ndarray]:
    """Words, except that the first is one token per letter, as with tokenizers that merge a word and its space."""
    results = []
    for spans in word_spans(texts):
        letters = [(i, i + 1) for i in range(*spans[0])]
        results.append(np.array(letters + spans[1:].tolist(), dtype=np.int32))
    return results


@pytest.mark.parametrize("overlap", [0, 3])
def test_passage_fits_even_if_it_has_more_tokens_than_in_context(overlap: int) -> None:
    text = " ".join(["abcd"] * 60)
    passages = texts_of(text, 10, overlap, first_word_costs_more)
    assert max(num_tokens(first_word_costs_more, passage) for passage in passages) == 10
    assert {word for passage in passages for word in passage.split()} == {"abcd"}


def test_long_text_is_tokenized_in_windows_without_effect() -> None:
    text = " ".join(f"Sentence {i} says something, more or less." for i in range(3000))
    assert len(text) > 3 * chunking._WINDOW_CHARACTERS
    longest = 0

    def watched(texts: list[str]) -> list[np.ndarray]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return word_spans(texts)

    passages = chunk(document(text), watched, 50, 10)
    assert longest <= chunking._WINDOW_CHARACTERS
    assert all(passage.text.endswith(".") and passage.text.startswith("Sentence") for passage in passages)
    assert passages[0].text == texts_of(text[:1000], 50, 10)[0]


def test_tokenizer_spans_ignores_and_keeps_truncation_and_padding() -> None:
    tokenizer = wordpiece()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    (spans,) = tokenizer_spans(tokenizer)(["the fox over the lazy dog"])
    text = "the fox over the lazy dog"
    assert "".join(text[a:b] for a, b in spans) == text.replace(" ", "")
    assert tokenizer.truncation is not None
    assert tokenizer.padding is not None


def test_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(TypeError, match="str reports no character offsets"):
        tokenizer_spans("bert")


@pytest.mark.parametrize(("size", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_sizes_out_of_range_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"got {overlap} and {size}"):
        chunk(document("a"), word_spans, size, overlap)


def test_long_run_without_spaces_becomes_several_passages() -> None:
    document = Document("d", "before " + "x" * 10_000 + " after", "", "{}", "")
    passages = chunk(document, word_spans, 20, 0)
    assert max(len(passage.text) for passage in passages) <= 20 * 64
    assert "".join(passage.text for passage in passages).replace(" ", "") == document.text.replace(" ", "")


@given(st.lists(st.text(st.characters(max_codepoint=140), max_size=60) | st.text("a_ .\n\x1f", max_size=60)))
@settings(deadline=None)
def test_words_of_ascii_texts_are_those_of_other_texts(texts: list[str]) -> None:
    expected = [[match.span() for match in chunking._WORD.finditer(text)] for text in texts]
    assert [list(map(tuple, spans.tolist())) for spans in word_spans(texts)] == expected
