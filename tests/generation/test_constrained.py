"""Answers of a language: best paths against enumeration, draws, the witness of every step, valid answers, refusals."""

import functools
import itertools
import json
import random

import jsonschema
import pytest
import torch
from models import model_of, word_tokenizer
from torch.testing import assert_close

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.generation.automaton import Alt, Repeat, Seq, compiled, literal
from xdlm_hf.generation.confidence import ConfidenceSettings
from xdlm_hf.generation.constrained import ConstrainedSampler, StepScores
from xdlm_hf.generation.json_schema import schema_automaton
from xdlm_hf.generation.refinement import (
    BudgetRefinement,
    EditLimit,
    NoRefinement,
    OffInLastSteps,
    RemaskingRefinement,
    ThresholdRefinement,
)
from xdlm_hf.generation.token_automaton import TokenAutomaton, Vocabulary

# Tokens that overlap, a cut "é", a mask (7), two ends (8, 9) and a token without any move (10).
TOKENS = [b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", "é".encode(), None, None, None, b"z", b"aab"]
MASK, END, PAD = 7, 8, 9
LANGUAGES = {
    "(ab|ba|a)*": Repeat(Alt((literal("ab"), literal("ba"), literal("a")))),
    "é{1,2}b?": Seq((Repeat(literal("é"), 1, 2), Repeat(literal("b"), 0, 1))),
    "a{2,5}|bab|éa": Alt((Repeat(literal("a"), 2, 5), literal("bab"), literal("éa"))),
}


@functools.cache
def language_of(name):
    return compiled(LANGUAGES[name])


def automaton_of(name):
    return TokenAutomaton(language_of(name), Vocabulary(TOKENS), 13, [END], [PAD], [MASK])


def is_word(name, ids):
    """Whether ids are a text of the language, then ends, the first of them END."""
    text, rest = b"", list(ids)
    while rest and rest[0] not in (END, PAD):
        if rest[0] >= len(TOKENS) or TOKENS[rest[0]] is None:
            return False
        text += TOKENS[rest.pop(0)]
    return language_of(name).matches(text) and (not rest or rest[0] == END) and set(rest) <= {END, PAD}


def all_words(name, length):
    return [ids for ids in itertools.product(range(13), repeat=length) if is_word(name, ids)]


@pytest.fixture(scope="module", params=LANGUAGES)
def enumerated(request):
    return request.param, torch.tensor(all_words(request.param, 4))


def sampler_of(name, length, refinement=None, temperature=0.0, steps=2, polish_steps=0, seed=0, **settings):
    settings = ConfidenceSettings(
        MASK, 0.0, steps, refinement=refinement, temperature=temperature, polish_steps=polish_steps, **settings
    )
    return ConstrainedSampler(automaton_of(name), settings, 0, length, torch.Generator().manual_seed(seed))


def predictions(sampler, logits, ids, holes):
    return StepScores(sampler, logits).prediction(ids, holes)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_path_is_the_best_word_of_an_enumeration(enumerated, seed):
    name, words = enumerated
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, 4, 13, generator=generator, dtype=torch.float64)
    # Rows with tokens that stand, those of some word.
    ids = words[torch.randint(len(words), (6,), generator=generator)]
    holes = torch.rand(6, 4, generator=generator) < torch.arange(6)[:, None] / 5
    predicted = predictions(sampler_of(name, 4), logits, torch.where(holes, MASK, ids), holes)
    for row in range(6):
        agree = words[((words == ids[row]) | holes[row]).all(-1)]
        scores = logits[row].log_softmax(-1)[torch.arange(4), agree].sum(-1)
        found = logits[row].log_softmax(-1)[torch.arange(4), predicted[row]].sum(-1)
        assert (agree == predicted[row]).all(-1).any()
        assert_close(found, scores.max(), atol=1e-12, rtol=0)


def test_draws_have_the_probabilities_of_the_words(enumerated):
    name, words = enumerated
    number, temperature = 4000, 0.7
    logits = torch.randn(1, 4, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampler = sampler_of(name, 4, temperature=temperature)
    ids = torch.full((number, 4), MASK)
    drawn = predictions(sampler, logits.expand(number, -1, -1), ids, ids == MASK)
    expected = (logits[0] / temperature)[torch.arange(4), words].sum(-1).softmax(0) * number
    counts = (drawn[:, None] == words).all(-1).sum(0)
    assert counts.sum() == number
    large = expected >= 5
    rest, rest_expected = counts[~large].sum(), expected[~large].sum()
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum() + (rest - rest_expected) ** 2 / (
        rest_expected + 1
    )
    freedom = int(large.sum())
    # A chi-square variable exceeds its mean by 8 standard deviations with a probability below 1e-7.
    assert statistic < freedom + 8 * (2 * freedom) ** 0.5 + 20


def test_a_token_of_probability_zero_is_taken_only_if_there_is_no_other():
    logits = torch.zeros(2, 3, 13, dtype=torch.float64)
    logits[0, :, 6] = -torch.inf  # "é" as one token; it can be written with two
    logits[1, :, [4, 6]] = -torch.inf  # now it cannot
    ids = torch.full((2, 3), MASK)
    for temperature in (0.0, 1.0):
        predicted = predictions(sampler_of("é{1,2}b?", 3, temperature=temperature), logits, ids, ids == MASK)
        assert predicted[0].tolist()[:2] == [4, 5] and all(is_word("é{1,2}b?", row) for row in predicted.tolist())


def test_undefined_logits_are_still_reported():
    sampler = sampler_of("(ab|ba|a)*", 3, steps=1)
    canvas = sampler.begin(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    logits = torch.full((1, 3, 13), torch.nan)
    canvas = sampler.step(canvas, logits, sampler.request(canvas, 0))
    assert canvas.undefined.all() and is_word("(ab|ba|a)*", canvas.ids[0].tolist())


def test_the_shortest_answer_is_counted_in_tokens():
    assert [automaton_of(name).shortest for name in LANGUAGES] == [0, 1, 2]
    with pytest.raises(
        ValueError, match=r"max_new_tokens=1 is too short for json_schema: its shortest answer has 2 tok"
    ):
        ConstrainedSampler(
            TokenAutomaton(compiled(literal("aba")), Vocabulary(TOKENS), 13, [END], [], [MASK]),
            ConfidenceSettings(MASK, 0.0, 1),
            0,
            1,
        )
    with pytest.raises(ValueError, match="the tokenizer has no tokens that spell an answer"):
        TokenAutomaton(compiled(literal("x")), Vocabulary(TOKENS), 13, [END], [], [MASK])
    with pytest.raises(ValueError, match="the tokenizer has no tokens"):
        TokenAutomaton(compiled(literal("é")), Vocabulary(TOKENS), 13, [END], [], [MASK, 5, 6])


POLICIES = {
    "none": NoRefinement(),
    "budget 0.3": BudgetRefinement(0.3),
    "budget 1": BudgetRefinement(1),
    "threshold": ThresholdRefinement(0.05),
    "limit": EditLimit(BudgetRefinement(0.5), 1),
    "off": OffInLastSteps(BudgetRefinement(0.5), 2),
    "remdm": RemaskingRefinement("cap", 0.5),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_after_every_step_the_tokens_that_stand_agree_with_a_word(enumerated, policy):
    name, words = enumerated
    changed = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        refinement = POLICIES[policy]
        polish = 3 if refinement.edits else 0
        options = dict(temperature=float(seed % 2), steps=4, polish_steps=polish, seed=seed)
        options |= {"remasking": "random"} if seed % 4 == 3 else {}
        options |= {"confidence_threshold": 0.3} if seed % 4 == 2 else {}
        sampler = sampler_of(name, 4, refinement, **options)
        canvas = sampler.begin(torch.zeros(5, 4, dtype=torch.long), torch.ones(5, 4, dtype=torch.bool))
        i = sampler.first_step(canvas)
        while i < sampler.steps:
            before = canvas
            logits = 2 * torch.randn(5, 4, 13, generator=generator, dtype=torch.float64)
            canvas = sampler.step(canvas, logits, sampler.request(canvas, i))
            agrees = ((canvas.ids[:, None] == words) | canvas.holes[:, None]).all(-1)
            assert agrees.any(-1).all()
            edited = (before.ids != canvas.ids) & ~before.holes & ~canvas.holes
            assert edited.sum(-1).equal(canvas.num_edits - before.num_edits)
            if isinstance(refinement, BudgetRefinement) and refinement.mixing_ratio < 1:
                odds = refinement.mixing_ratio / (1 - refinement.mixing_ratio)
                assert (canvas.num_edits <= odds * (~canvas.holes).sum(-1) + 1e-9).all()
            changed += int(edited.sum())
            i = sampler.next_step(before, canvas, i)
        assert not canvas.holes.any() and all(is_word(name, row) for row in canvas.ids.tolist())
    assert (changed > 0) == refinement.edits  # or the test would not see an edit


# ---------------------------------------------------------------------------------------------------------------------
# With a model and a tokenizer

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "größe": {"type": "integer", "minimum": 0, "maximum": 250},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "tags"],
}


@pytest.fixture(scope="module")
def tokenizer():
    text = '{"name": "naïve 漢字", "größe": 120, "tags": ["red", "blue"], "ok": true} The quick brown fox jumps.'
    return train_tokenizer([text] * 3, vocab_size=330)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer, max_sequence_length=128)


OPTIONS = [
    {},
    {"steps": 6, "mixing_ratio": 0.1},
    {"steps": 6, "mixing_ratio": 0.5, "polish_steps": 3},
    {"steps": 6, "mixing_ratio": 1.0, "refinement": {"max_edits_per_token": 1}},
    {"steps": 4, "refinement": {"policy": "threshold", "threshold": 0.01}},
    {"steps": 6, "refinement": {"policy": "remdm_cap", "rate": 0.5}},
    {"steps": 24, "parallel_decoding": {"threshold": 0.4}, "mixing_ratio": 0.3},
    {"steps": 4, "temperature": 1.5, "mixing_ratio": 0.3},
    {"steps": 4, "cfg_scale": 1.0, "remasking": "random"},
    {"steps": 4, "early_stop": True, "mixing_ratio": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_answer_is_valid_with_random_weights(model, tokenizer, options):
    inputs = tokenizer(["a fox:", "The quick brown"], return_tensors="pt", padding=True, padding_side="left")
    common = dict(max_new_tokens=44, tokenizer=tokenizer, num_return_sequences=2, seed=1, return_dict_in_generate=True)
    for schema in (RECORD, json.dumps({"type": "object"}), {"type": "string", "pattern": "[ïé漢]+", "title": "t"}):
        output = model.generate(**inputs, json_schema=schema, **common, **options)
        texts = tokenizer.batch_decode(output.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for text in texts:
            jsonschema.validate(json.loads(text), json.loads(schema) if isinstance(schema, str) else schema)
        assert (output.num_edits > 0).any() or "mixing_ratio" not in options or schema is not RECORD


def test_an_answer_that_is_valid_anyway_does_not_change(tokenizer, model):
    # Weights that always predict the same JSON: with the schema every step commits the same.
    ids = tokenizer('{"name": "fox","tags": []}').input_ids
    ids += [tokenizer.eos_token_id] * (40 - len(ids))

    class Certain:
        def __call__(self, text, scores):
            wanted = torch.tensor(ids).repeat(len(scores) // len(ids))
            return scores.scatter(1, wanted[:, None], 40.0)

    options = dict(max_new_tokens=40, steps=5, logits_processor=[Certain()], mixing_ratio=0.2, output_history=True)
    prompt = tokenizer("a fox:", return_tensors="pt").input_ids
    plain, constrained = (
        model.generate(prompt, **options, **given, return_dict_in_generate=True)
        for given in ({}, {"json_schema": RECORD, "tokenizer": tokenizer})
    )
    assert all(a.equal(b) for a, b in zip(plain.history, constrained.history, strict=True))
    assert_close(plain.confidences, constrained.confidences, equal_nan=True)


def test_suppressed_tokens_and_those_beyond_the_vocabulary_are_not_taken(tokenizer):
    model = model_of(tokenizer, vocab_size=len(tokenizer) + 40)
    quotes = [i for token, i in tokenizer.get_vocab().items() if '"' in token and token != '"']
    common = dict(max_new_tokens=40, steps=5, tokenizer=tokenizer, json_schema=RECORD)
    answer = model.generate(**common, suppress_tokens=quotes)
    assert not torch.isin(answer, torch.tensor(quotes)).any() and answer.max() < len(tokenizer)
    json.loads(tokenizer.decode(answer[0], skip_special_tokens=True))
    every = [i for token, i in tokenizer.get_vocab().items() if '"' in token]
    with pytest.raises(ValueError, match="the tokenizer has no tokens that spell an answer by json_schema"):
        model.generate(**common, suppress_tokens=every)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_new_tokens": 6}, r"max_new_tokens=6 is too short for json_schema: its shortest answer has \d+ tokens"),
        ({"tokenizer": None}, "json_schema needs the model's fast tokenizer, not NoneType; pass tokenizer=tokenizer"),
        ({"tokenizer": word_tokenizer()}, "needs a byte-level tokenizer .* this one joins its tokens by no decoder"),
        ({"eos_token_id": []}, "json_schema needs eos_token_id, with which an answer ends"),
        ({"block_length": 8}, "block_length=8 does not predict the whole answer in each step, so it does not go with"),
        ({"cache": "prefix"}, "cache='prefix' does not recompute the whole answer in each step, so it"),
        ({"compile": "graphs"}, "compile='graphs' pads the positions of a step, so it does not go with json_schema"),
        ({"temperature": 1.0, "top_p": 0.5}, "top_p=0.5 may exclude all tokens that continue the answer's JSON, so it"),
        ({"temperature": 1.0, "top_k": 5}, "top_k=5 may exclude all tokens"),
        ({"stop_strings": ["a"]}, r"stop_strings=\['a'\] may cut the answer, so it does not go with json_schema"),
        ({"sampler": "ancestral"}, "sampler='ancestral' has no option json_schema=<dict of 3 elements>"),
        ({"reference_compat": True}, "the released sampler.* has no option json_schema"),
        ({"holes": [(0, 2)], "max_new_tokens": None}, "json_schema=.* does not apply to generation with holes"),
        ({"json_schema": {"type": "number", "minimum": 2}}, "at #: 'minimum' is not supported for type number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_a_schema_is_refused(model, tokenizer, change, message):
    prompt = tokenizer("a fox jumps", return_tensors="pt").input_ids
    common = {"max_new_tokens": 40, "tokenizer": tokenizer, "json_schema": RECORD}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **{**common, **change})


def test_what_only_the_checkpoint_stores_gives_way(model, tokenizer):
    stored = model.generation_config
    try:
        model.generation_config = type(stored)(block_length=8, use_cache="prefix", max_new_tokens=40, steps=10)
        answer = model.generate(json_schema=RECORD, tokenizer=tokenizer)
    finally:
        model.generation_config = stored
    jsonschema.validate(json.loads(tokenizer.decode(answer[0], skip_special_tokens=True)), RECORD)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_classes_and_moves_are_those_of_the_bytes():
    rng = random.Random(0)
    language = schema_automaton(json.dumps(RECORD))
    tokens = [bytes([i]) for i in range(256)] + [None] * 4
    text = '{"name": "naïve 漢字", "größe": 120, "tags": ["red", "blue"], "ok": true}'.encode()
    tokens += sorted({text[i : i + n] for n in (2, 3, 5, 9) for i in range(len(text))})
    automaton = TokenAutomaton(language, Vocabulary(tokens), len(tokens) + 2, [256], [257], [258])
    moves = {}
    for edge, (source, target) in enumerate(zip(automaton.source.tolist(), automaton.target.tolist(), strict=True)):
        for c in automaton.members[automaton.set_of[edge]].nonzero().flatten().tolist():
            assert (source, c) not in moves  # deterministic
            moves[source, c] = target
    states = sorted({int(s) for s in automaton.source})
    for _ in range(4000):
        token, state = rng.randrange(len(tokens)), rng.choice(states)
        expected = state
        for byte in tokens[token] or [None]:
            if (
                expected is not None
                and expected < automaton.end
                and byte is not None
                and language.step[expected, byte] >= 0
            ):
                expected = int(language.step[expected, byte])
            else:
                expected = None
        if token in (256, 257):
            ends = state == automaton.end or (token == 256 and language.accepts[state])
            expected = automaton.end if ends else None
        assert moves.get((state, int(automaton.class_of[token]))) == expected, (state, tokens[token])


def test_tokens_of_byte_fallback_and_added_tokens_are_read():
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "\u2581", '"', "x", "\u2581x", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("yes!", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokens = Vocabulary.of(tokenizer).tokens
    assert tokens[:7] == [None, None, b" ", b'"', b"x", b" x", b"\x00"] and tokens[-1] == b"yes!"
    assert Vocabulary.of(tokenizer) is Vocabulary.of(tokenizer)
    language = schema_automaton(json.dumps({"type": "string", "pattern": "é( x|yes!)+"}))
    automaton = TokenAutomaton(language, Vocabulary.of(tokenizer), len(tokenizer), [1], [], [0])
    scores = automaton.class_scores(torch.randn(12, len(tokenizer), generator=torch.Generator().manual_seed(0)))
    classes = automaton.path(scores[None].double())[0].tolist()
    members = [(automaton.class_of == c).nonzero().flatten().tolist() for c in classes]
    text = tokenizer.decode([ids[0] for ids in members], skip_special_tokens=True)
    assert language.matches(text.encode())
