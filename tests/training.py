"""A tiny training run that tests share; also the script that each process of a distributed test runs.

torchrun --standalone --nproc_per_node 2 tests/training.py '{"output_dir": "...", "per_device_train_batch_size": 2}'
"""

import contextlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import datasets
import torch
import yaml
from models import tiny_model
from safetensors.torch import save_file

from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.precision import _local_part
from xdlm_hf.training.processes import run_script
from xdlm_hf.training.trainer import XDLMTrainer

VOCAB, MASK, LENGTH = 48, 5, 12
SCRIPT = str(pathlib.Path(__file__))
KILLS = ("kill_in_step", "kill_in_save", "nan_in_step", "nan_in_save", "terminate_in_step")
CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "recipes" / "configs"
ENDS_CLEANLY = str(pathlib.Path(__file__).parent / "ends_cleanly.py")  # goes before a script that is launched


def flags(values):
    """Names and values as a command line; None leaves an option out."""
    return [str(part) for name, value in values.items() if value is not None for part in (f"--{name}", value)]


# Options of three steps of a recipe that trains from scratch, in seconds.
THREE_STEPS = {
    "max_steps": 3,
    "warmup_steps": 1,
    "per_device_train_batch_size": 4,
    "global_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
    "bf16": "false",
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def logged(output_dir, name="loss"):
    history = json.loads((pathlib.Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def rows(number, seed=0):
    """Rows of unequal length and weight: a mean over rows or over processes would differ from one over tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (number,), generator=generator).tolist()
    ids = [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"input_ids": row, "prompt_mask": [position < index % 3 for position in range(len(row))]}
        for index, row in enumerate(ids)
    ]


# Adam divides a gradient by its own size: where that is no more than rounding, the default epsilon of 1e-8 makes a
# whole step of it, and weights differ by up to 2e-5 between processors. With this one a rounding error d of a gradient
# moves a weight by at most learning_rate * d / epsilon = 3 d a step, and weights stay within 2e-7.
ADAM_EPSILON = 1e-3


def arguments(output_dir, **options):
    return XDLMTrainingArguments(
        output_dir=str(output_dir),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 3e-3,
            "adam_epsilon": ADAM_EPSILON,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 7,
            **options,
        },
    )


def documents_and_tokenizer(texts=40, shards=2):
    """Each document holds its number, so that rows tell which were read."""
    documents = [f"text number {i} with {'many ' * (i % 5)}words" for i in range(texts)]
    tokenizer = train_tokenizer([f"text number {i} with many words" for i in range(40)], 300)
    return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset(shards), tokenizer


def packed():
    return PackedDataset(*documents_and_tokenizer(), LENGTH, max_rows=28)  # whole rows, and whole batches of 4


def stream(texts=40, seed=0, shards=2, **options):
    """A shuffled stream."""
    return PackedStream(
        *documents_and_tokenizer(texts, shards),
        LENGTH,
        **{"shuffle_seed": seed, "shuffle_buffer": 16, **options},
    )


class RecordingTrainer(XDLMTrainer):
    """Keeps the batches of every step; may kill its own process, as a power cut would, in a step or in a save."""

    kill_in_step = kill_in_save = nan_in_step = nan_in_save = terminate_in_step = None

    def get_batch_samples(self, *args):
        batches, tokens = super().get_batch_samples(*args)
        self.__dict__.setdefault("seen", []).append([batch["input_ids"].tolist() for batch in batches])
        return batches, tokens

    def _weighted_loss(self, *args):  # as from a network that overflows, on the second process alone
        total, losses = super()._weighted_loss(*args)
        if self.state.global_step + 1 == self.nan_in_step and self.args.process_index == 1:
            total, losses = total * torch.nan, losses * torch.nan
        return total, losses

    def _save_checkpoint(self, *args):  # the weights overflowed in the part that the second process holds
        if self.state.global_step == self.nan_in_save and self.args.process_index == 1:
            first = next(self.accelerator.unwrap_model(self.model).parameters())
            _local_part(first).view(-1)[0] = torch.nan
        super()._save_checkpoint(*args)

    def _get_grad_norm(self, *args, **kwargs):  # after the backward pass, before the weights change
        if self.state.global_step + 1 == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.global_step + 1 == self.terminate_in_step and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._get_grad_norm(*args, **kwargs)

    def _save_rng_state(self, output_dir):  # weights and optimizer are written, the rest is not
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._save_rng_state(output_dir)


def trainer(
    output_dir, train_rows=20, eval_rows=0, model=None, streaming=False, pack=False, kind=XDLMTrainer, **options
):
    args = arguments(output_dir, **options)
    if streaming:
        rank = {"rank": args.process_index, "world_size": args.world_size}
        model, data = model or tiny_model(vocab_size=300), stream(**rank)
    elif pack:
        model, data = model or tiny_model(vocab_size=300), packed()
    else:
        model, data = model or tiny_model(), rows(train_rows)
    return kind(model=model, args=args, train_dataset=data, eval_dataset=rows(eval_rows, seed=1) if eval_rows else None)


def one_batch(run, row_count=4):
    """The first global batch, as the training loop would hand it over."""
    batches, tokens = run.get_batch_samples(iter([run.data_collator(run.train_dataset[:row_count])]), 1, "cpu")
    return batches[0], tokens


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def parameter_gap(model, end):
    return max((p - end[name]).abs().max().item() for name, p in model.named_parameters())


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextlib.contextmanager
def disk_that_takes(size):
    """No file may grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def partitioned(tmp_path, name):
    """The repository's config, except that ZeRO-3 spreads even tiny parameters, which it would keep whole."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    ours = config.get("deepspeed_config", {})
    if ours.get("zero_stage") != 3:
        return CONFIGS / f"{name}.yaml"
    engine = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ours["gradient_accumulation_steps"],
        "gradient_clipping": ours["gradient_clipping"],
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": ours["zero3_save_16bit_model"],
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": ours["offload_optimizer_device"]},
            "offload_param": {"device": ours["offload_param_device"]},
        },
    }
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    config["deepspeed_config"] = {
        "deepspeed_config_file": str(tmp_path / "engine.json"),
        "zero3_init_flag": ours["zero3_init_flag"],
    }
    del config["mixed_precision"]  # the engine's file says it
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "zero.yaml"


def launch(*command, timeout=600, **environment):
    """Run `python *command` to its end and return its output; on a timeout its processes are told to stop."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun and accelerate pass it on to their workers
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"no end after {timeout} s; output so far:\n{output[-3000:]}") from None
    return process.returncode, output


def main():
    options = json.loads(sys.argv[1])
    output_dir = pathlib.Path(options.pop("output_dir"))
    resume = options.pop("resume", None)
    kill = {name: options.pop(name, None) for name in KILLS}
    run = trainer(output_dir, kind=RecordingTrainer, **options)
    vars(run).update(kill)
    run.train(resume_from_checkpoint=resume)
    metrics = run.evaluate() if run.eval_dataset else {}
    rank = run.args.process_index
    (output_dir / f"seen_{rank}.json").write_text(json.dumps(run.seen))
    if run.is_world_process_zero():
        result = {"losses": losses(run), "metrics": metrics, "processes": run.args.world_size}
        (output_dir / "result.json").write_text(json.dumps(result))
        save_file(state(run.model), output_dir / "end.st")


if __name__ == "__main__":
    run_script(main)
