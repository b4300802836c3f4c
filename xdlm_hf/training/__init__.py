"""Training: Transformers' Trainer with the XDLM objective, checkpoints, metrics and planning of runs.

trainer        `XDLMTrainer`
arguments      `XDLMTrainingArguments`
row_noise      times, noise and lengths of training rows, each from its own generator
nelbo          NELBO of held-out rows, its noise and standard error
batch_loss     the loss of a noisy batch, fused with the output layer or from logits
places         which row of the run each row of a batch is
checkpointing  the trainer's base class, which saves and resumes
checkpoints    atomic checkpoints and resume checks
ema            average of the weights, for evaluation and the final model
averages       file of that average
checksums      checksums of a checkpoint's files
preemption     checkpoints on SIGTERM and at time intervals
metrics        logged figures: loss by kind of token and by time, its standard error, speed
adapters       LoRA, also on 4-bit weights, with the noise it was trained with
optimizers     memory of each optimizer's state
planning       parameters, operations and memory of a run
storage        disk space of a run, and main memory of loading
precision      dtypes of trained weights, and whether weights are finite
revisions      the commit of a Hub dataset that a run reads
processes      work done by the main process for all, and the end of a script
"""
