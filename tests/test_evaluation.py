"""Measuring a model: tiny models by hand, parity with the naive way, a real model's known output."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lingraft.errors import CorpusError, ModelError, RecipeError
from lingraft.evaluation import generation
from lingraft.evaluation.bits_per_byte import bits_per_byte, split_spans, unigram_bits_per_byte
from lingraft.evaluation.forward import batches_by_length, hidden_states, logits_in_chunks
from lingraft.evaluation.generation import Answer, generate_checks, greedy_answers
from lingraft.evaluation.multiple_choice import letter_tokens, multiple_choice, wilson
from lingraft.evaluation.scoreboard import alarms, build_entry, gate_checks, parse_limit
from lingraft.prompts import encode_chat, encode_prompt, multiple_choice_prompt

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
TEXTS = [
    "The patient has a fever.",
    "환자는 열이 난다. 기침도 한다.",
    "a",
    "Two short lines.\nAnd a third, longer one.",
]

# Gemma's rules: BOS inside, strict alternation, system text in the first user turn, answers trimmed.
GEMMA_TEMPLATE = """\
{{ bos_token }}{% if messages[0].role == 'system' %}\
{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n\
{{ system if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}\
{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"""


def byte_tokenizer(chat_template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """Five special tokens, then one token a byte: ids and lengths can be told by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>" if bos else None, eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


VOCABULARY = len(SPECIAL) + 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def tiny(kind: str) -> PreTrainedModel:
    """A random model: two layers, width 32; Gemma with a sliding window of 8 in the first layer."""
    torch.manual_seed(0)
    if kind == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **GEMMA_LAYERS, final_logit_softcapping=2.0))
    elif kind == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **GEMMA_LAYERS))
    else:
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = Gemma3Config(
            text_config={**SHAPE, **GEMMA_LAYERS},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            image_token_index=0,
        )
        model = Gemma3ForConditionalGeneration(config)
    return model.eval()


KINDS = ["llama", "qwen2", "gemma2", "gemma3", "gemma3-vision"]


def score(model: PreTrainedModel, texts: list[str], *, span_bytes: int = 1000, batch_tokens: int = 4096, **kwargs):
    tokenizer = kwargs.get("tokenizer") or byte_tokenizer()
    return bits_per_byte(model, tokenizer, texts, span_bytes=span_bytes, batch_tokens=batch_tokens, device="cpu")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    folder = shared_data / "models" / "stories260K" / "hf"
    reference = json.loads((folder / "greedy_reference.json").read_text())
    return (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
        reference,
    )


# ---------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_logits_are_the_models_own(kind):
    model = tiny(kind)
    ids = torch.randint(5, VOCABULARY, (3, 100))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        hidden = hidden_states(model, ids, mask).reshape(300, -1)
        chunks = list(logits_in_chunks(model, hidden))
    assert [len(chunk) for chunk in chunks] == [256, 44]
    torch.testing.assert_close(torch.cat(chunks).view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_batches_hold_every_sequence_within_the_budget():
    lengths = [3, 9, 1, 4, 30, 4]
    batches = list(batches_by_length(lengths, batch_tokens=12))
    assert batches == [[4], [1], [3, 5, 0], [2]]


# ---------------------------------------------------------------------------------------- bits per byte


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_uniform_model_pays_log2_of_the_vocabulary_for_each_token(kind):
    model = tiny(kind)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    result = score(model, TEXTS)
    assert result["tokens"] == result["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert result["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY))
    assert (result["low"], result["high"]) == pytest.approx((math.log2(VOCABULARY),) * 2)
    assert result["characters"] == sum(map(len, TEXTS))
    assert result["documents"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_naive_loss_of_each_text(kind):
    model, tokenizer = tiny(kind), byte_tokenizer()
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    result = score(model, TEXTS)
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_padding_changes_nothing(kind):
    model = tiny(kind)
    together = score(model, TEXTS, batch_tokens=4096)
    alone = score(model, TEXTS, batch_tokens=1)
    assert together["nats"] == pytest.approx(alone["nats"], abs=1e-5 * alone["tokens"])


def test_spans_cut_between_characters_and_join_to_the_text():
    assert list(split_spans("a가나b", 4)) == ["a가", "나b"]
    assert list(split_spans("가나", 5)) == ["가", "나"]
    assert list(split_spans("", 5)) == []
    for size in (4, 7, 50):
        spans = list(split_spans(TEXTS[1], size))
        assert "".join(spans) == TEXTS[1]
        assert max(len(span.encode()) for span in spans) <= size


def test_a_document_in_spans_costs_what_the_spans_cost_as_documents():
    model = tiny("llama")
    spans = list(split_spans(TEXTS[1], 10))
    assert score(model, [TEXTS[1]], span_bytes=10)["nats"] == pytest.approx(score(model, spans)["nats"])


def test_eos_stands_before_the_text_where_there_is_no_bos():
    model = tiny("llama")
    without_bos = byte_tokenizer(bos=False)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[without_bos.eos_token_id]])).logits[0, 0]
    token = without_bos.encode("a")[0]
    expected = -logits.log_softmax(-1)[token].item()
    assert score(model, ["a"], tokenizer=without_bos)["nats"] == pytest.approx(expected, rel=1e-5)


def test_interval_is_over_documents():
    model = tiny("llama")
    result = score(model, TEXTS)
    per_text = [score(model, [text]) for text in TEXTS]
    assert per_text[0]["low"] is None
    size = sum(one["bytes"] for one in per_text)
    residuals = [one["nats"] / math.log(2) - result["bits_per_byte"] * one["bytes"] for one in per_text]
    margin = 1.96 * math.sqrt(4 / 3 * sum(r * r for r in residuals)) / size
    assert result["high"] - result["bits_per_byte"] == pytest.approx(margin, rel=1e-3)
    assert result["bits_per_byte"] - result["low"] == pytest.approx(margin, rel=1e-3)


def test_measuring_leaves_every_modules_mode_as_it_was():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    score(model, TEXTS)
    assert [module.training for module in model.modules()] == before


def test_no_text_is_an_error_that_says_so():
    with pytest.raises(CorpusError, match="held-out text is empty"):
        score(tiny("llama"), [""])


def test_unigram_line_by_hand():
    # Training "aab": a has (2+1), b (1+1), c (0+1) of 3 + 261.
    expected = -(math.log2(3 / 264) + math.log2(1 / 264)) / 2
    assert unigram_bits_per_byte(byte_tokenizer(), ["aab"], ["ac"], span_bytes=100) == pytest.approx(expected)
    assert unigram_bits_per_byte(byte_tokenizer(), [], ["ac"], span_bytes=100) == pytest.approx(math.log2(261))


def test_a_trained_model_scores_far_below_the_unigram_line(stories):
    model, tokenizer, _ = stories
    text = [
        "Once upon a time, there was a boy named Tim. He had a big red ball and he loved to play with it.",
        "One day, Lily went to the park with her mom. She saw a small dog and wanted to be its friend.",
        'The sun was hot, so the cat sat under a tree. A bird came and said, "Hello, do you want to play?"',
    ]
    result = score(model, text, tokenizer=tokenizer)
    unigram = unigram_bits_per_byte(tokenizer, text, text, span_bytes=1000)
    assert result["bits_per_byte"] == pytest.approx(0.66, abs=0.01)  # its published 1.297 nats a token are 0.7
    assert result["low"] < result["bits_per_byte"] < result["high"] < unigram


# --------------------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    question: str
    choices: list[str]
    answer: int


QUESTIONS = [
    Question("Which is a fruit?", ["stone", "apple", "chair", "rain"], 1),
    Question("어느 것이 색인가?", ["파랑", "의자", "바람", "소금"], 0),
    Question("Which is an animal, of these two?", ["rock", "dog"], 1),
]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # 8 of 10 by Agresti and Coull (1998); none and all have closed forms: z²/(n + z²) and n/(n + z²).
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 3.8416 / 13.8416), (10, 10, 10 / 13.8416, 1.0)],
)
def test_wilson_against_known_values(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("template", [None, GEMMA_TEMPLATE])
def test_letters_are_scored_on_the_tokens_that_training_sees(template):
    tokenizer = byte_tokenizer(template)
    text = multiple_choice_prompt("Which?", ["x", "y"])
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": "B"}])
    lead, letters = letter_tokens(tokenizer, 2)
    scored = [*encode_prompt(tokenizer, text), *lead, *letters[1]]
    assert ids[: len(scored)] == scored
    assert mask[len(scored) - 1]
    assert tokenizer.decode(letters[1]) == "B"


@pytest.mark.parametrize("letter", "ABD")
def test_a_model_that_always_says_one_letter(letter):
    model, tokenizer = tiny("llama"), byte_tokenizer(GEMMA_TEMPLATE)
    head = torch.nn.Linear(32, VOCABULARY)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.zero_()[tokenizer.convert_tokens_to_ids(letter)] = 5.0
    model.lm_head = head
    result = multiple_choice(model, tokenizer, QUESTIONS, language="en", batch_tokens=200, device="cpu")
    index = "ABCD".index(letter)
    assert result["answers"] == [index, index, index if index < 2 else 0]
    right = sum(q.answer == answer for q, answer in zip(QUESTIONS, result["answers"], strict=True))
    assert (result["correct"], result["total"]) == (right, 3)
    assert result["chance"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert result["at_chance"]  # three questions prove nothing


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_letters_of_several_tokens_are_scored_in_full(stories, batch_tokens):
    """The tiny vocabulary knows " B" but writes " A" as two tokens: the sum over both counts."""
    model, tokenizer, _ = stories
    lead, letters = letter_tokens(tokenizer, 4)
    assert (lead, [len(letter) for letter in letters]) == ([], [2, 1, 2, 2])
    result = multiple_choice(model, tokenizer, QUESTIONS, language="ko", batch_tokens=batch_tokens, device="cpu")
    for question, answer in zip(QUESTIONS, result["answers"], strict=True):
        prompt = encode_prompt(tokenizer, multiple_choice_prompt(question.question, question.choices, "ko"))
        scores = []
        for letter in letters[: len(question.choices)]:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *letter]])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(letter)))
        assert answer == scores.index(max(scores))


@pytest.mark.parametrize("template", [None, GEMMA_TEMPLATE])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_cloze_compares_the_whole_answers_after_the_question_alone(template, batch_tokens):
    model, tokenizer = tiny("gemma3"), byte_tokenizer(template)
    result = multiple_choice(
        model, tokenizer, QUESTIONS, language="en", scoring="cloze", batch_tokens=batch_tokens, device="cpu"
    )
    for question, answer in zip(QUESTIONS, result["answers"], strict=True):
        scores = []
        for choice in question.choices:
            turns = [{"role": "user", "content": question.question}, {"role": "assistant", "content": choice}]
            ids, written = encode_chat(tokenizer, turns)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[t - 1, ids[t]].item() for t in range(1, len(ids)) if written[t]))
        assert answer == scores.index(max(scores))
    assert result["scoring"] == "cloze"


def test_prompt_speaks_the_language():
    assert multiple_choice_prompt("Q", ["x", "y"]) == "Q\nA. x\nB. y\nAnswer:"
    assert multiple_choice_prompt("Q", ["x", "y"], "ko") == "Q\nA. x\nB. y\n정답:"


# ------------------------------------------------------------------------------------------------ chats


def marked(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[str, str]:
    ids, mask = encode_chat(tokenizer, messages)
    return tokenizer.decode(ids), tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def test_mask_on_a_gemma_template():
    tokenizer = byte_tokenizer(GEMMA_TEMPLATE)
    whole, written = marked(tokenizer, chat("Q1", " A1 ", "Q2", "A2", system="Be brief."))
    assert whole == (
        "<bos><start_of_turn>user\nBe brief.\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
    )
    assert written == "A1<end_of_turn>A2<end_of_turn>"
    assert whole == tokenizer.apply_chat_template(chat("Q1", " A1 ", "Q2", "A2", system="Be brief."), tokenize=False)


def test_mask_without_a_template():
    assert marked(byte_tokenizer(), chat("Q1", "A1", "Q2", "A2", system="Be brief.")) == (
        "<bos>Be brief.\n\nQ1 A1<eos>\n\nQ2 A2<eos>",
        " A1<eos> A2<eos>",
    )
    assert marked(byte_tokenizer(bos=False), chat("", "A")) == (" A<eos>", " A<eos>")


def test_no_stray_spaces_from_sentencepiece(stories):
    """Cut into pieces, the conversation has the tokens of the whole text."""
    _, tokenizer, _ = stories
    ids, mask = encode_chat(tokenizer, chat("Once upon", "a time"))
    assert ids == [1, *tokenizer.encode("Once upon a time", add_special_tokens=False), 2]
    assert tokenizer.decode(ids[: mask.index(True)], skip_special_tokens=True) == "Once upon"
    tokenizer_with_template = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer_with_template.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    ids, _ = encode_chat(tokenizer_with_template, chat("Hi", "Oh"))
    assert ids == tokenizer.encode("user:Hi\nassistant:Oh\n", add_special_tokens=False)


def test_a_conversation_that_the_template_refuses():
    with pytest.raises(CorpusError, match=r"roles user, user: Conversation roles must alternate; mend"):
        encode_chat(byte_tokenizer(GEMMA_TEMPLATE), [*chat("Q1"), *chat("Q2")])


def test_a_template_that_rewrites_earlier_turns():
    forgetful = byte_tokenizer("{% for m in messages[-2:] %}[{{ m.content }}]{% endfor %}")
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        encode_chat(forgetful, chat("Q1", "A1", "Q2", "A2"))


# ------------------------------------------------------------------------------------------- generation


def test_greedy_text_of_a_real_model(stories):
    model, tokenizer, reference = stories
    state = torch.get_rng_state()
    config = model.generation_config.to_dict()
    length = len(reference["greedy_ids"]) - len(reference["prompt_ids"])
    result = generate_checks(
        model.train(),
        tokenizer,
        ["", "Once upon a time"],
        language="en",
        max_new_tokens=length,
        new_token_ids=reference["greedy_ids"],
        device="cpu",
    )
    assert result["samples"][0] == {"prompt": "", "text": reference["text"], "loop": False}
    assert 0.2 < result["repetition"] < 0.5
    assert (result["empty"], result["target_script"], result["broken"], result["loops"]) == (0, 1, 0, 0)
    assert result["new_token_share"] > 0.9
    assert model.training
    assert model.generation_config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma3-vision"])
def test_batched_answers_are_those_one_by_one(kind, monkeypatch):
    """Prompts shorter and longer than Gemma's sliding window of 8, padded on the left."""
    model, tokenizer = tiny(kind), byte_tokenizer()
    prompts = ["a", "A prompt much longer than the window", "열이 난다"]
    together = greedy_answers(model, tokenizer, prompts, max_new_tokens=24, device="cpu")
    monkeypatch.setattr(generation, "PROMPTS_PER_BATCH", 1)
    alone = greedy_answers(model, tokenizer, prompts, max_new_tokens=24, device="cpu")
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    ids = encode_prompt(tokenizer, prompts[1])
    for token in alone[1].ids:
        with torch.inference_mode():
            assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)


def test_generation_ends_at_the_templates_end_of_turn():
    """A model that only ever ends its turn writes nothing, though <end_of_turn> is not its EOS."""
    model, tokenizer = tiny("llama"), byte_tokenizer(GEMMA_TEMPLATE)
    model.lm_head = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("<end_of_turn>")] = 100.0
    assert greedy_answers(model, tokenizer, ["Hi"], max_new_tokens=5, device="cpu") == [Answer([], "")]


def test_the_models_own_repetition_penalty_hides_nothing():
    model, tokenizer = tiny("llama"), byte_tokenizer()
    plain = greedy_answers(model, tokenizer, ["Hi"], max_new_tokens=20, device="cpu")
    model.generation_config.repetition_penalty = 50.0
    assert greedy_answers(model, tokenizer, ["Hi"], max_new_tokens=20, device="cpu") == plain


def test_shares_by_hand(monkeypatch):
    answers = [
        Answer([1, 2, 3, 4] * 4, "한글 abc"),  # 13 4-grams, 4 of them different
        Answer([5, 6, 7, 8, 9], "네\N{REPLACEMENT CHARACTER}"),  # 2 4-grams
        Answer([], " "),
    ]
    monkeypatch.setattr(generation, "greedy_answers", lambda *args, **kwargs: answers)
    result = generate_checks(
        None, None, ["a", "b", "c"], language="ko", max_new_tokens=16, new_token_ids=[4, 9], device="cpu"
    )
    assert result["repetition"] == 9 / 15
    assert result["loops"] == result["empty"] == 1 / 3
    assert result["target_script"] == 3 / 6
    assert result["new_token_share"] == 5 / 21
    assert result["broken"] == 1 / 9
    assert [sample["loop"] for sample in result["samples"]] == [True, False, False]


# ------------------------------------------------------------------------------------------- scoreboard


def questions(language: str, correct: int, total: int = 100, chance: float = 0.25) -> dict:
    low, high = wilson(correct, total)
    return {
        "language": language,
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "low": low,
        "high": high,
        "chance": chance,
        "at_chance": low <= chance <= high,
        "answers": [0] * total,
    }


def entry(english: float, *sets: dict) -> dict:
    return build_entry(
        step="02",
        title="Stage 1",
        tokens_trained=1000,
        languages={"en": {"bits_per_byte": english}},
        questions={f"set {i}": result for i, result in enumerate(sets)},
        generations={},
        seconds=3.2,
    )


def test_gates_by_hand():
    base = entry(1.0, questions("en", 60), questions("en", 40, 300), questions("ko", 25))
    limits = {"english_bpb_rise": 0.02, "en_accuracy_drop": 0.01}
    later = entry(1.015, questions("en", 60), questions("en", 32, 300), questions("ko", 50))
    rise, drop = gate_checks(later, base, limits)
    assert rise == {
        "name": "english_bpb_rise",
        "language": "en",
        "metric": "bpb_rise",
        "value": pytest.approx(0.015),
        "limit": 0.02,
        "passed": True,
    }
    assert drop["value"] == pytest.approx(8 / 400)  # 100 of 400 before, 92 after: weighted by the sets' totals
    assert not drop["passed"]
    assert "answers" not in later["questions"]["set 0"]
    assert json.loads(json.dumps(later)) == later


def test_a_value_that_is_not_a_number_fails_the_gate():
    [check] = gate_checks(entry(math.nan), entry(1.0), {"en_bpb_rise": 0.02})
    assert not check["passed"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("english_bpb", "gate 'english_bpb' is unknown; .* for example english_bpb_rise"),
        ("korean_bpb_rise", "no Korean text was measured; add held-out text"),
        ("ko_accuracy_drop", "no Korean questions were measured; add a question set"),
    ],
)
def test_gates_that_cannot_be_judged(limit, message):
    with pytest.raises(RecipeError, match=message):
        gate_checks(entry(1.0), entry(1.0), {limit: 0.02})


def test_gate_names():
    assert parse_limit("korean_accuracy_drop") == parse_limit("ko_accuracy_drop") == ("ko", "accuracy_drop")
    assert parse_limit("xx_bpb_rise") == ("xx", "bpb_rise")


def test_alarms_for_a_base_that_guesses():
    board = entry(1.0, questions("en", 60), questions("en", 27), questions("ko", 24), questions("en", 3))
    english, korean, inverted = alarms(board, "en")
    assert english.startswith("alarm: the base answers set 1 at chance (27.0% of 100, interval 19.3% to 36.4%")
    assert "the evaluation or the base is broken; check the prompt format" in english
    assert korean.startswith("note: base at chance on set 2")
    assert "never met Korean" in korean
    assert inverted.startswith("alarm: the base answers set 3 below chance")
