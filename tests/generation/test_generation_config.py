"""Options of a call, a checkpoint and a config: which win, which are stored, and which are refused by name."""

import numpy as np
import peft
import pytest
import torch
from models import small_model
from transformers import AutoModelForCausalLM
from transformers.generation import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from xdlm_hf import (
    XDLMGenerationConfig,
)
from xdlm_hf.generation.resolution import resolve


def test_config_is_saved_and_loaded_with_the_model(tmp_path):
    model = small_model(mixing_ratio=0.1)
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, block_length=4, temperature=0.5, seed=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, XDLMGenerationConfig)
    stored, given = loaded.generation_config.to_dict(), model.generation_config.to_dict()
    assert {k: stored[k] for k in XDLMGenerationConfig.OPTIONS} == {k: given[k] for k in XDLMGenerationConfig.OPTIONS}
    assert loaded.generate().equal(model.generate()) and loaded.generate().shape == (1, 8)


def test_precedence_call_then_config_then_model_then_defaults():
    model = small_model(mixing_ratio=0.5)
    model.generation_config = XDLMGenerationConfig(max_new_tokens=4, steps=2)
    assert model.generate().shape == (1, 4)
    assert model.generate(generation_config=XDLMGenerationConfig(max_new_tokens=6)).shape == (1, 6)
    assert model.generate(generation_config=XDLMGenerationConfig(max_new_tokens=6), max_new_tokens=8).shape == (1, 8)
    options = resolve(model, None, {"max_new_tokens": 8})
    assert (options.mixing_ratio, options.mask_token_id, options.steps, options.sampler) == (0.5, 20, 2, "confidence")
    assert model.generation_config.max_new_tokens == 4


def test_a_checkpoints_autoregressive_options_are_dropped_and_said(tmp_path, caplog):
    stored = (
        '{"eos_token_id": 5, "do_sample": true, "num_beams": 2, "min_p": null, "max_length": 99, "use_cache": false}'
    )
    (tmp_path / "generation_config.json").write_text(stored)
    with caplog.at_level("WARNING", logger="transformers"):
        logger = __import__("logging").getLogger("transformers")
        logger.propagate, before = True, logger.propagate
        config = XDLMGenerationConfig.from_pretrained(tmp_path)
        logger.propagate = before
    assert config.eos_token_id == 5 and config.do_sample is True and config.max_length is None
    assert not hasattr(config, "num_beams") and "['num_beams', 'max_length', 'use_cache']" in caplog.text


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"gen_length": 5}, r"no option gen_length=5 \(use max_new_tokens\)"),
        ({"do_sample": 1}, r"do_sample=1 must be True or False"),
        ({"do_sample": True, "temperature": 0.0}, r"do_sample=True draws tokens, but temperature=0.0 takes the most"),
        (
            {"do_sample": False, "temperature": 0.5},
            r"do_sample=False takes the most likely tokens, but temperature=0.5",
        ),
        ({"do_sample": False, "sampler": "ancestral"}, r"'ancestral' always draws; leave out do_sample=False, or use"),
        ({"do_sample": False, "top_k": 5}, r"top_k=5.*do_sample=False is greedy"),
        ({"max_length": 20}, r"max_length=20 and max_new_tokens=16 both set the length of the answer; leave out one"),
        ({"max_length": 2, "max_new_tokens": None}, r"max_length=2 leaves no room for an answer after a prompt of 2"),
        ({"max_length": 20, "holes": [(0, 1)], "max_new_tokens": None}, r"max_length=20 does not apply to generation"),
        ({"stop_strings": ["a", ""]}, r"stop_strings=\['a', ''\] must be a string or a list of strings, none of them"),
        ({"stop_strings": "a"}, r"stop_strings='a' need the model's tokenizer, not NoneType; pass tokenizer=tokenizer"),
        ({"input_ids": {"input_ids": torch.ones(1, 2)}}, r"pass what the tokenizer returns as generate\(\*\*inputs\)"),
        ({"generation_config": GenerationConfig(num_beams=4)}, r"no option num_beams=4\."),
        ({"foo": 1}, r"no option foo=1\. Options: max_new_tokens, steps"),
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1.5 must lie in \[0, 1\]"),
        ({"steps": 0}, r"steps=0 must be a positive integer"),
        ({"steps": 2.5}, r"steps=2.5 must be a positive integer"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1 must be a positive integer"),
        ({"block_length": 3}, r"steps=4 is too few for the 6 blocks of 3 tokens.*steps=6 or more"),
        ({"steps": 17}, r"steps=17 is more than max_new_tokens=16"),
        ({"block_length": 0}, r"block_length=0 must be a positive integer"),
        ({"sampler": "ddim"}, r"sampler='ddim' is not known; choose one of \['confidence', 'ancestral'\]"),
        ({"remasking": "lucky"}, r"remasking='lucky' is not known"),
        ({"temperature": -1}, r"temperature=-1 must be 0 or above"),
        ({"temperature": "hot"}, r"temperature='hot' must be a finite number"),
        ({"mixing_ratio": "0.1"}, r"mixing_ratio='0.1' must be a finite number"),
        ({"cfg_scale": float("nan")}, r"cfg_scale=nan must be a finite number"),
        ({"mask_token_id": -1}, r"mask_token_id holds token id -1, outside \[0, 24\)"),
        ({"pad_token_id": 24}, r"pad_token_id holds token id 24"),
        ({"pad_token_id": 20}, r"pad_token_id=20 is the mask token"),
        ({"seed": 1.5}, r"seed=1.5 must be an integer"),
        ({"suppress_tokens": [i for i in range(24) if i != 20]}, r"suppress_tokens excludes all 24 tokens"),
        ({"input_ids": [[1, 2]]}, r"must be tensors: tokenize with return_tensors='pt'"),
        ({"input_ids": torch.empty(0, 2, dtype=torch.long)}, r"of shape \(B, P\) with B >= 1, got \(0, 2\)"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": -1, "temperature": 1.0}, r"top_k=-1 must be a positive integer"),
        ({"top_k": 5}, r"top_k=5.*temperature=0 is greedy"),
        ({"cfg_scale": -1.0}, r"cfg_scale=-1.0 must be 0"),
        ({"sampler": "ancestral", "block_length": 4}, r"sampler='ancestral' has no option block_length=4"),
        ({"sampler": "ancestral", "polish_steps": 4}, r"sampler='ancestral' has no option polish_steps=4"),
        ({"confidence_threshold": -0.1}, r"confidence_threshold=-0.1 must lie in \(0, 1\]"),
        ({"confidence_threshold": 1.5}, r"confidence_threshold=1.5 must lie in \(0, 1\]"),
        ({"confidence_threshold": 0.9, "remasking": "random"}, r"remasking='random' chooses holes at random"),
        ({"confidence_factor": -1}, r"confidence_factor=-1 must be above 0"),
        ({"early_stop": "yes"}, r"early_stop='yes' must be True or False"),
        ({"refinement": "magic"}, r"refinement='magic' is not known; choose one of \['budget', 'threshold'"),
        ({"refinement": "threshold"}, r"refinement='threshold' needs edit_threshold, a number in \(0, 1\]"),
        ({"refinement": "remask_cap"}, r"refinement='remdm_cap' needs remask_rate"),
        ({"refinement": {"policy": "threshold"}}, r"needs .*\{'policy': 'threshold', 'threshold': ...\}"),
        ({"refinement": {"policy": "threshold", "threshold": 2}}, r"refinement\['threshold'\]=2 must lie in \(0, 1\]"),
        ({"refinement": {"speed": 2}}, r"refinement={'speed': 2} has no setting 'speed'; settings: policy, threshold"),
        ({"refinement": {"policy": "none"}, "edit_threshold": 0.5}, r"edit_threshold=0.5 is a setting of refinement="),
        ({"cache": "dual", "use_cache": "dual"}, r"use_cache='dual' is a setting of cache='dual'.*leave out use_cache"),
        ({"cache": "paged"}, r"cache='paged' is not known; choose one of \['prefix', 'dual', False\]"),
        ({"parallel_decoding": 0.9}, r"parallel_decoding=0.9 must be a dict with one of 'threshold', 'factor'"),
        ({"edit_threshold": 0.5}, r"edit_threshold=0.5 is a setting of refinement='threshold'"),
        (
            {"refinement": "budget", "remask_rate": 0.5, "mixing_ratio": 0.1},
            r"remask_rate=0.5 is a setting .*remdm_cap",
        ),
        ({"refinement": "budget"}, r"refinement='budget' allows no edits at mixing_ratio=0"),
        ({"polish_steps": 2}, r"polish_steps=2 only edit, but mixing_ratio=0 does not"),
        ({"polish_steps": 2, "refinement": "none"}, r"polish_steps=2 only edit, but refinement='none' does not"),
        ({"max_edits_per_token": 2}, r"max_edits_per_token=2 has no effect with mixing_ratio=0.0"),
        ({"refinement_off_steps": 2}, r"refinement_off_steps=2 has no effect"),
        ({"max_edits_per_token": 0}, r"max_edits_per_token=0 must be a positive integer"),
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>' must be an integer or a list of integers"),
        ({"eos_token_id": [1.5]}, r"eos_token_id=\[1.5\] must be an integer or a list"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 2]])},
            r"attention_mask holds 2; it must be 1 at text and 0 at padding",
        ),
        ({"reference_compat": True, "confidence_threshold": 0.9}, r"has no option confidence_threshold=0.9"),
        ({"sampler": "ancestral", "temperature": 0.0}, r"temperature=0.0 must be positive"),
        ({"reference_compat": True, "mixing_ratio": 1.0}, r"with mixing_ratio=1: the released edit budget"),
        ({"suppress_tokens": [24]}, r"suppress_tokens holds token id 24, outside \[0, 24\)"),
        ({"max_new_tokens": 65}, r"a prompt of 2 tokens and max_new_tokens=65 make 67 tokens, more than.* 64"),
        ({"seed": 1, "generator": torch.Generator()}, r"either seed=1 or a generator"),
        ({"generation_config": {"steps": 3}}, r"must be an XDLMGenerationConfig, not dict"),
        (
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask of shape \(1, 3\) must have the shape of input_ids, \(1, 2\)",
        ),
        ({"input_ids": torch.tensor([[1, 24]])}, r"input_ids holds token id 24, outside \[0, 24\)"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be integers of shape .*, got \(2,\)"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, r"input_ids must be integers.*torch.float32"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(kwargs, message):
    model = small_model()
    model.forward = None  # would raise TypeError, were it called
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[1, 2]]), "steps": 4, "max_new_tokens": 16, **kwargs})


def test_attention_mask_alone_is_refused():
    with pytest.raises(ValueError, match="attention_mask was given without input_ids"):
        small_model().generate(attention_mask=torch.ones(1, 2), steps=2)


def test_numpy_integers_are_integers():
    assert small_model().generate(steps=np.int64(2), max_new_tokens=np.int64(4)).shape == (1, 4)


SAMPLINGS = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"confidence_threshold": 0.9}]
SAMPLINGS += [{"sampler": "ancestral"}, {"reference_compat": True}, {"sampler": "ancestral", "reference_compat": True}]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_processor_that_leaves_no_distribution_is_named(options, value):
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, value)

    with pytest.raises(ValueError, match="cannot draw a token.*NaN or inf, or every token of a position is excluded"):
        small_model().generate(steps=2, max_new_tokens=4, logits_processor=LogitsProcessorList([Nothing()]), **options)


@pytest.mark.parametrize("options", [{}, {"refinement": "remask_cap", "remask_rate": 0.5}], ids=str)
def test_a_filled_position_that_cannot_be_edited_may_have_no_distribution(options):
    class HolesOnly(LogitsProcessor):
        def __call__(self, input_ids, scores):
            holes = input_ids.diagonal() == 20  # a row of scores for each column
            return scores.masked_fill(~holes[:, None], -torch.inf)

    model, processors = small_model(), LogitsProcessorList([HolesOnly()])
    options = {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.0, "seed": 0, **options}
    assert model.generate(logits_processor=processors, **options).equal(model.generate(**options))


def test_overflown_weights_of_one_row_are_named():
    model = small_model()
    model.get_input_embeddings().weight.data[3] = torch.nan
    ids = torch.tensor([[1, 2], [3, 2]])
    assert model.generate(ids[:1], steps=2, max_new_tokens=4).shape == (1, 6)
    with pytest.raises(ValueError, match="some logits are NaN or inf.*bfloat16 does not"):
        model.generate(ids, steps=2, max_new_tokens=4)


def test_unknown_option_in_the_config_class():
    with pytest.raises(ValueError, match=r"no option num_beams=4\."):
        XDLMGenerationConfig(num_beams=4)


def test_adapters_saved_as_causal_ones_load_and_generate(tmp_path):
    # Other LLaDA tools save LoRA adapters with peft's task type CAUSAL_LM.
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=r".*blocks\.\d+\.(q_proj|ff_out)")
    peft.get_peft_model(small_model(), lora).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert loaded.generate(input_ids=torch.tensor([[1, 2]]), steps=2, max_new_tokens=4).shape == (1, 6)
    assert loaded(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2)).logits.shape == (1, 2, 24)


def test_stored_options_give_way_to_the_sampler_the_call_chooses():
    model = small_model()
    stored = {"block_length": 4, "remasking": "random", "top_k": 3, "temperature": 0.5, "seed": 1}
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, **stored)
    assert model.generate(sampler="ancestral").shape == (1, 8)
    assert model.generate(temperature=0.0).shape == (1, 8)
    assert model.generate(generator=torch.Generator()).shape == (1, 8)
    with pytest.raises(ValueError, match="sampler='ancestral' has no option block_length=2"):
        model.generate(sampler="ancestral", block_length=2)
    with pytest.raises(ValueError, match="top_k=2.*temperature=0 is greedy"):
        model.generate(temperature=0.0, top_k=2)


@pytest.mark.parametrize(
    "stored, call",
    [
        ({"use_cache": "dual", "cache_refresh": 4}, {"use_cache": False}),
        ({"refinement": "threshold", "edit_threshold": 0.9, "polish_steps": 2}, {"refinement": "none"}),
        ({"refinement": "remask_cap", "remask_rate": 0.1}, {"refinement": "budget", "mixing_ratio": 0.1}),
        ({"refinement": "budget", "mixing_ratio": 0.1, "polish_steps": 2}, {"mixing_ratio": 0.0}),
        ({"confidence_threshold": 0.9, "use_cache": "dual"}, {"reference_compat": True}),
        ({"confidence_threshold": 0.9}, {"remasking": "random", "seed": 1}),
        ({"remasking": "random"}, {"confidence_threshold": 0.9}),
        ({"temperature": 0.0}, {"sampler": "ancestral", "seed": 1}),
    ],
)
def test_stored_options_give_way_to_what_the_call_chooses(stored, call):
    model = small_model()
    without = model.generate(steps=4, max_new_tokens=8, **call)
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, **stored)
    assert model.generate(**call).equal(without)


def test_a_stored_remasking_stays_where_nothing_contradicts_it():
    model = small_model()
    model.generation_config = XDLMGenerationConfig(remasking="random")
    assert resolve(model, None, {}).remasking == "random"
