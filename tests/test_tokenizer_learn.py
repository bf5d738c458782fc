"""What is learnt: the merges themselves, pieces of several words, and which pieces are worth their place."""

import random
from itertools import islice, pairwise

import pytest

from lingraft.tokenizer.learn import balance, learn
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.merges import merge_greedily
from lingraft.tokenizer.new import train_sentencepiece
from lingraft.tokenizer.phrases import Sample, count_phrases, with_other_words, words_of
from lingraft.tokenizer.pieces import wanted_characters

HANGUL = frozenset({"Hangul"})


def naive_merges(runs: dict[tuple[str, ...], float], count: int) -> list[tuple[str, str, float]]:
    """Textbook BPE: count all pairs anew for every merge."""
    words = {run: list(run) for run in runs}
    merges: list[tuple[str, str, float]] = []
    made: set[str] = set()
    while len(merges) < count:
        counts: dict[tuple[str, str], float] = {}
        for run, weight in runs.items():
            for pair in pairwise(words[run]):
                if pair[0] + pair[1] not in made:
                    counts[pair] = counts.get(pair, 0.0) + weight
        (left, right), best = max(counts.items(), key=lambda item: item[1])
        merges.append((left, right, best))
        made.add(left + right)
        for word in words.values():
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == (left, right):
                    word[place : place + 2] = [left + right]
                place += 1
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_merges_are_those_of_textbook_bpe(seed: int) -> None:
    rng = random.Random(seed)
    # random weights and many runs: no two of the pairs count the same, so their order is the same
    runs = {tuple(rng.choices("abcab", k=rng.randint(2, 12))): rng.random() for _ in range(300)}
    ours = list(islice(merge_greedily(runs, 1e-9, lambda piece: True), 40))
    theirs = naive_merges(runs, 40)
    assert [merge[:2] for merge in ours] == [merge[:2] for merge in theirs]
    assert [merge[2] for merge in ours] == pytest.approx([merge[2] for merge in theirs])


def test_merges_stop_at_the_least_count_and_skip_what_is_not_allowed() -> None:
    runs = {("a", "b", "c"): 3.0, ("b", "c"): 2.0, ("a", "a", "a"): 4.0}
    merges = list(merge_greedily(runs, 3, lambda piece: piece != "bc"))
    assert merges == [("a", "a", 8.0), ("aa", "a", 4.0), ("a", "b", 3.0), ("ab", "c", 3.0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    folder = tmp_path_factory.mktemp("base")
    return train_sentencepiece(["가 나 다 라 마 the cat sat on the mat"] * 9, 300, 8, folder)


def test_phrases_go_on_across_spaces(base: BaseTokenizer) -> None:
    wanted = wanted_characters(HANGUL)
    phrases = count_phrases(base, [("가나 다라 the 마가\n나  다라, 가 나", 2.0)], wanted, frozenset())
    assert phrases == {
        ("가", "나", "▁다", "라"): 2.0,
        ("▁마", "가"): 2.0,
        ("나", "▁", "▁다", "라"): 2.0,
        ("▁", "가", "▁나"): 2.0,
    }


def test_pieces_of_several_words(base: BaseTokenizer) -> None:
    texts = [("가나 다라", 9.0), ("다라", 1.0)]
    assert max((new.piece for new in learn(base, texts, new_tokens=9).pieces), key=len) == "가나▁다라"
    single = [new.piece for new in learn(base, texts, new_tokens=9, max_words=1).pieces]
    assert all("▁" not in piece[1:] for piece in single)


def test_a_long_stream_is_sampled_evenly_and_repeatably() -> None:
    texts = [(f"text {i:04}", 1.0) for i in range(2_000)]
    sample, again = Sample(limit=5_000), Sample(limit=5_000)
    assert list(sample.watch(texts)) == texts
    list(again.watch(texts))
    assert sample.texts() == again.texts()
    assert sample.rate == 0.25
    assert len(sample.texts()) == pytest.approx(500, rel=0.15)
    assert {weight for _, weight in sample.texts()} == {4.0}


def test_one_text_longer_than_the_limit_is_sampled_in_parts() -> None:
    text = "\n".join(f"line {i}" for i in range(100_000))
    sample = Sample(limit=500_000)
    list(sample.watch([(text, 1.0)]))
    kept = sum(len(block) for block, _ in sample.texts())
    assert 0 < kept <= 500_000
    assert all(block in text for block, _ in sample.texts())


def test_words_that_the_sample_misses_are_added() -> None:
    phrases = {("a", "b", "▁c", "d"): 4.0}
    words = {("a", "b"): 7.0, ("▁c", "d"): 3.0, ("x", "y"): 1.0}
    assert list(words_of(("a", "b", "▁c", "d"))) == [("a", "b"), ("▁c", "d")]
    assert with_other_words(phrases, words) == phrases | {("a", "b"): 3.0, ("x", "y"): 1.0}


def test_a_character_competes_by_the_tokens_it_saves(base: BaseTokenizer) -> None:
    """Each 힣 costs three byte tokens: two saved each time, six in all, against five for 가나."""
    texts = [("가나", 5.0), ("힣", 3.0), ("뷁", 2.0)]

    def pieces(new_tokens: int, characters_first: bool = False) -> list[str]:
        learnt = learn(base, texts, new_tokens=new_tokens, scripts=HANGUL, characters_first=characters_first)
        return [new.piece for new in learnt.pieces]

    assert pieces(1) == ["힣"]
    assert pieces(2) == ["힣", "가나"]
    assert pieces(2, characters_first=True) == ["힣", "뷁"]
    assert pieces(3) == pieces(3, characters_first=True) == ["힣", "뷁", "가나"]


def test_balance() -> None:
    sizes = {"law": 900.0, "names": 100.0, "empty": 0.0}
    assert balance(sizes, 1) == {"law": 1.0, "names": 1.0}
    assert balance(sizes, 0) == {"law": pytest.approx(500 / 900), "names": 5.0}
    assert balance(sizes, 0.5) == {"law": pytest.approx(750 / 900), "names": 2.5}
    assert balance({"empty": 0.0}, 0.5) == {}
