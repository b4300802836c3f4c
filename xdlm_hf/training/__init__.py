"""Transformers' Trainer with the XDLM objective, and what a long run needs.

trainer        `XDLMTrainer`
arguments      `XDLMTrainingArguments`
row_noise      times, noise and lengths of training rows, each from its own generator
nelbo          NELBO of held-out rows, its noise and standard error
batch_loss      the loss of a noisy batch, fused with the output layer or from logits
places         which row of the run each row of a batch is
checkpointing  the part of the trainer that saves and resumes
checkpoints    atomic checkpoints and resume checks
ema            average of the weights, for evaluation and the final model
checksums      whether a checkpoint is what was written
preemption     SIGTERM, and checkpoints by the clock
metrics        loss by kind of token and by time, its standard error, speed
adapters       LoRA, also on 4-bit weights, with the k it was trained at
optimizers     what each optimizer keeps in memory
planning       parameters, operations and memory of a run
storage        disk of a run, and memory that loading takes
precision      dtypes of trained weights, and whether weights are finite
revisions      the commit of a Hub dataset, from the start of a run to its end
processes      work done once for all processes, and the end of a script
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
