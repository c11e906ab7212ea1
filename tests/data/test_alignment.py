"""Tokens are aligned where both tokenizations end at the same byte."""

import json
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import MODELS, smollm2_tokenizer
from oprd.data.alignment import UNSTABLE_TOKENS, Aligner, TokenBytes
from oprd.data.chat import encode, end_of_turn, stop_ids
from oprd.errors import TeacherMismatch
from oprd.models.pretrained import load_tokenizer

TEXTS = [
    "the cat sat on the mat",
    "12+34=46 and 46-5=41",
    "naïve café 你好世界 🙂🙂",
    "  spaces   and\n\nlines\t",
    "thethe thethe",
]
NAMES = ("miniature", "wide", "smollm2", "sentencepiece", "metaspace")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is part of the next word, characters that are not in the vocabulary become their bytes."""
    special = [AddedToken(name, special=True) for name in ("<unk>", "</s>")]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, limit_alphabet=30)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(TEXTS[:2] * 20, trainer)
    known = tokenizer.get_vocab()
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in _merges(tokenizer)]
    vocab = known | {f"<0x{byte:02X}>": len(known) + byte for byte in range(256)}
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """As newer SentencePiece conversions: words are split at spaces, the mark goes before the first word too."""
    words = Tokenizer(models.BPE(byte_fallback=True, vocab={}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], limit_alphabet=40)
    words.train_from_iterator(TEXTS * 20, trainer)
    known = words.get_vocab()
    vocab = known | {f"<0x{byte:02X}>": len(known) + byte for byte in range(256)}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in _merges(words)]
    words.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


def _merges(tokenizer: Tokenizer) -> list:
    return json.loads(tokenizer.to_str())["model"]["merges"]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "miniature": load_tokenizer(str(MODELS / "base")),
        "wide": load_tokenizer(str(MODELS / "wide_teacher")),
        "smollm2": smollm2_tokenizer(),
        "sentencepiece": sentencepiece(),
        "metaspace": metaspace(),
    }


@cache  # taking a tokenizer of 49,152 pieces apart a thousand times takes minutes
def token_bytes(tokenizer) -> TokenBytes:
    return TokenBytes(tokenizer, "x")


@cache
def aligner(student, teacher) -> Aligner:
    return Aligner(
        student,
        teacher,
        student_stops=stop_ids(student, None),
        teacher_end=end_of_turn(teacher, stop_ids(teacher, None)),
        teacher_name="t",
    )


def ends(tokenizer, ids, positions) -> list[bytes]:
    """Everything written up to each position, in the bytes of the tokens."""
    pieces = token_bytes(tokenizer).pieces(ids)
    return [b"".join(pieces[: i + 1]) for i in positions]


def test_digits_align_where_a_piece_of_two_ends_by_hand(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["wide"]
    ids = (*encode(student, "12+34=46"), student.eos_token_id)
    alignment = aligner(student, teacher).align(ids, finished=True)
    assert [teacher.decode([i]) for i in alignment.teacher_ids] == ["1", "2", "+", "34", "=", "4", "6", "<|end|>"]
    # student: 1 2 + 3 4 = 4 6 <|end|>, aligned everywhere but inside 34
    assert alignment.student_index == (0, 1, 2, 4, 5, 6, 7, 8)
    assert alignment.teacher_index == (0, 1, 2, 3, 4, 5, 6, 7)


def test_a_character_of_several_tokens_aligns_at_its_last_byte(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["metaspace"]
    ids = encode(student, "aé🙂")  # one token per byte: 1 + 2 + 4
    alignment = aligner(student, teacher).align(ids, finished=True)
    assert ends(student, ids, alignment.student_index)[-1].decode() == "aé🙂"


def test_a_completion_cut_inside_a_character_aligns_nothing_from_the_last_whole_token_on(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["smollm2"]
    ids = encode(student, "a+b🙂")[:-2]
    alignment = aligner(student, teacher).align(ids, finished=False)
    assert teacher.decode(alignment.teacher_ids) == "a+b"
    assert alignment.student_index == (0, 1)


def test_the_word_that_a_cut_ends_in_is_not_aligned_because_more_text_could_change_its_tokens(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["smollm2"]
    whole, cut = encode(student, "it is multiplication"), encode(student, "it is multipli")
    of_whole = aligner(student, teacher).align(whole, finished=True)
    of_cut = aligner(student, teacher).align(cut, finished=False)
    n = len(of_cut.teacher_ids)
    assert of_whole.teacher_ids[: n - 1] != of_cut.teacher_ids[:-1]  # more than its last token is another
    assert of_cut.student_index == (1, 4)  # behind `it` and ` is`
    assert set(of_cut.student_index) <= set(of_whole.student_index)


def test_the_teachers_token_that_ends_at_a_cut_is_not_aligned(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["wide"]
    whole, cut = encode(student, "1+34"), encode(student, "1+3")
    # of the whole text 3 is no token of the teacher's; of the cut one it is, because of the cut
    assert aligner(student, teacher).align((*whole, student.eos_token_id), finished=True).student_index == (0, 1, 3, 4)
    assert aligner(student, teacher).align(cut, finished=False).student_index == (0, 1)


def test_an_unfinished_completion_gets_no_end_of_turn(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["wide"]
    alignment = aligner(student, teacher).align(encode(student, "1+2"), finished=False)
    assert teacher.eos_token_id not in alignment.teacher_ids


def test_bytes_that_are_no_text_end_the_alignment(tokenizers):
    student, teacher = tokenizers["miniature"], tokenizers["wide"]
    a, stray, b = encode(student, "1+")[0], encode(student, "é")[1], encode(student, "2")[0]
    alignment = aligner(student, teacher).align((a, stray, b), finished=False)
    assert alignment.student_index == (0,)


def test_an_empty_completion_has_no_aligned_tokens(tokenizers):
    alignment = aligner(tokenizers["wide"], tokenizers["smollm2"]).align((), finished=False)
    assert (alignment.student_index, alignment.teacher_ids) == ((), ())


def test_a_normalizing_teacher_aligns_up_to_the_first_change(tokenizers):
    lower = sentencepiece()
    lower.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    student = tokenizers["miniature"]
    ids = encode(student, "the Cat")
    alignment = aligner(student, lower).align(ids, finished=False)
    assert all(end.decode() in "the " for end in ends(student, ids, alignment.student_index))


def test_a_tokenizer_whose_pieces_are_not_bytes_is_refused():
    words = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(TeacherMismatch, match="x: alignment by bytes supports byte-level and SentencePiece tokenizers; this one decodes by WordPiece"):  # fmt: skip
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words), "x")


anything = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=40)
likely = st.lists(st.sampled_from([*TEXTS, " ", "  ", "▁", "\n", "é", "🙂", "100", "<|end|>", "</s>"]), max_size=5)
texts = anything | likely.map("".join)
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("teacher", NAMES)
@pytest.mark.parametrize("student", NAMES)
@slow
@given(text=texts, cut=st.integers(0, 60), finished=st.booleans())
@example(text=" leading", cut=60, finished=True)
@example(text="  ", cut=60, finished=False)
def test_every_pair_ends_at_the_same_byte_and_indices_increase(student, teacher, text, cut, finished, tokenizers):
    ours, theirs = tokenizers[student], tokenizers[teacher]
    ids = encode(ours, text)[:cut]
    ids = (*ids, ours.eos_token_id) if finished else ids
    alignment = aligner(ours, theirs).align(ids, finished=finished)
    for side in (alignment.student_index, alignment.teacher_index):
        assert list(side) == sorted(set(side))
    pairs = list(zip(alignment.student_index, alignment.teacher_index, strict=True))
    if finished:
        assert pairs.pop() == (len(ids) - 1, len(alignment.teacher_ids) - 1)
        assert alignment.teacher_ids[-1] == theirs.eos_token_id
    written = ends(ours, ids, [i for i, _ in pairs])
    read = ends(theirs, alignment.teacher_ids, [i for _, i in pairs])
    # SentencePiece may read one space more in front; nothing else may differ
    assert all(a == b or b" " + a == b for a, b in zip(written, read, strict=True))


@pytest.mark.parametrize("name", NAMES)
@slow
@given(text=texts)
def test_identical_tokenizers_align_every_token(name, text, tokenizers):
    tokenizer = tokenizers[name]
    written = token_bytes(tokenizer).pieces(encode(tokenizer, text))
    ids = encode(tokenizer, b"".join(written).decode(errors="ignore"))
    if b"".join(token_bytes(tokenizer).pieces(ids)) != b"".join(written):
        return  # a text that this tokenizer changes, such as one with its own space mark in it
    whole, cut = (aligner(tokenizer, tokenizer).align(ids, finished=finished) for finished in (True, False))
    assert whole.teacher_ids == cut.teacher_ids == ids
    assert whole.student_index == whole.teacher_index == tuple(range(len(ids)))
    assert cut.student_index == cut.teacher_index == whole.student_index[: len(cut.student_index)]
    assert not ids or len(ids) - UNSTABLE_TOKENS <= len(cut.student_index) < len(ids)
