"""Training on rows with boundary tokens: a run resumes where its stream stood."""

from models import tiny_model
from training import arguments, documents_and_tokenizer, losses, parameter_gap, state

from xdlm_hf.data.wrapping import WrappedStream, set_boundary_tokens
from xdlm_hf.training.trainer import XDLMTrainer

LENGTH = 12


def run(output_dir, **options):
    documents, tokenizer = documents_and_tokenizer()
    set_boundary_tokens(tokenizer)
    rows = WrappedStream(documents, tokenizer, LENGTH, shuffle_seed=0, shuffle_buffer=16)
    args = arguments(output_dir, save_strategy="steps", save_steps=2, max_steps=5, **options)
    model = tiny_model(vocab_size=300)
    return XDLMTrainer(model=model, args=args, train_dataset=rows), tokenizer


def test_a_resumed_run_repeats_the_whole_one(tmp_path):
    whole, tokenizer = run(tmp_path)
    seen = []
    draw = whole._add_noise
    whole._add_noise = lambda batch: (seen.append(batch["input_ids"].clone()), draw(batch))
    whole.train()
    for ids in seen:
        assert ids.shape == (4, LENGTH)
        assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.eos_token_id).all()
    resumed, _ = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and parameter_gap(resumed.model, state(whole.model)) == 0
